"""Fast inverses and densities of the masked autoregressive flows of zuko, nflows, normflows and pyro."""

from jacobiflow.adapters.acceleration import Acceleration
from jacobiflow.adapters.discovery import accelerate

__all__ = ["Acceleration", "accelerate"]
