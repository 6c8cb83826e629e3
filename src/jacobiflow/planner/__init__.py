"""The solver of each block: strategies, their notation, and plans by measurement."""

from jacobiflow.planner.cache import auto
from jacobiflow.planner.choice import Auto, resolve_strategy
from jacobiflow.planner.notation import is_auto
from jacobiflow.planner.planner import plan
from jacobiflow.planner.strategy import Prediction, Strategy

__all__ = ["Auto", "Prediction", "Strategy", "auto", "is_auto", "plan", "resolve_strategy"]
