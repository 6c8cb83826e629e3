"""The solver of each block: strategies, their notation, and plans by races."""

from jacobiflow.strategy.choice import auto, choose
from jacobiflow.strategy.notation import is_auto
from jacobiflow.strategy.plan import plan
from jacobiflow.strategy.strategy import Prediction, Strategy
from jacobiflow.strategy.tune import BlockTuning, Tuning, find_tuning, tune

__all__ = [
    "BlockTuning", "Prediction", "Strategy", "Tuning", "auto", "choose", "find_tuning", "is_auto", "plan", "tune",
]  # fmt: skip
