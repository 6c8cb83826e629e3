"""Which solver each block gets."""

from jacobiflow.strategy.planner import auto, plan
from jacobiflow.strategy.strategy import Prediction, Strategy, resolve

__all__ = ["Prediction", "Strategy", "auto", "plan", "resolve"]
