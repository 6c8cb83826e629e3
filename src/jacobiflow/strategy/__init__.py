"""Which solver each block gets."""

from jacobiflow.strategy.strategy import Strategy, resolve

__all__ = ["Strategy", "resolve"]
