"""TarFlow: the model, its attention over a cache, and the checkpoints of its original code."""

from jacobiflow.flows.tarflow.model import TarFlow, TarFlowBlock, TarFlowCache, TarFlowConfig

__all__ = ["TarFlow", "TarFlowBlock", "TarFlowCache", "TarFlowConfig"]
