"""Which solver each block gets."""

from jacobiflow.strategy.cache import auto
from jacobiflow.strategy.choose import choose, is_auto
from jacobiflow.strategy.options import PlanSettings
from jacobiflow.strategy.plan import plan
from jacobiflow.strategy.strategy import Prediction, Strategy

__all__ = ["PlanSettings", "Prediction", "Strategy", "auto", "choose", "is_auto", "plan"]
