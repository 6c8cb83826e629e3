"""Drop-in speed for the masked autoregressive flows of zuko, nflows and normflows; needs none of them installed."""

from jacobiflow.adapters.accelerate import accelerate
from jacobiflow.adapters.swapped import Acceleration

__all__ = ["Acceleration", "accelerate"]
