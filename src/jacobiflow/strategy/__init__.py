"""Which solver each block gets."""

from jacobiflow.strategy.notation import resolve
from jacobiflow.strategy.strategy import Strategy

__all__ = ["Strategy", "resolve"]
