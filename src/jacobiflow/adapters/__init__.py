"""Fast inverses and densities of the masked autoregressive flows of zuko, nflows, normflows and pyro."""

from jacobiflow.adapters.accelerate import accelerate
from jacobiflow.adapters.acceleration import Acceleration

__all__ = ["Acceleration", "accelerate"]
