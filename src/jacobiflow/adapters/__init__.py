"""Fast inverses and densities of the masked and coupling flows of zuko, nflows, glasflow, normflows and pyro."""

from jacobiflow.adapters.acceleration import Acceleration
from jacobiflow.adapters.discovery import accelerate
from jacobiflow.adapters.library_acceleration import LibraryAcceleration

__all__ = ["Acceleration", "LibraryAcceleration", "accelerate"]
