"""Which solver each block gets."""

from jacobiflow.strategy.cache import auto
from jacobiflow.strategy.choose import choose, is_auto
from jacobiflow.strategy.planner import plan
from jacobiflow.strategy.strategy import Prediction, Strategy

__all__ = ["Prediction", "Strategy", "auto", "choose", "is_auto", "plan"]
