"""The solver of each block: strategies, their notation, and plans by measurement."""

from jacobiflow.planner.cache import auto
from jacobiflow.planner.choice import Auto, resolve_strategy
from jacobiflow.planner.notation import is_auto
from jacobiflow.planner.planner import plan
from jacobiflow.planner.strategy import Prediction, Strategy
from jacobiflow.planner.tuning import BlockTuning, Tuning, find_tuning, tune

__all__ = [
    "Auto", "BlockTuning", "Prediction", "Strategy", "Tuning", "auto", "find_tuning", "is_auto", "plan",
    "resolve_strategy", "tune",
]  # fmt: skip
