"""TarFlow: the model, its blocks, its attention over a cache, and the checkpoints of its original code."""

from jacobiflow.flows.config import TarFlowConfig, TokenConfig
from jacobiflow.flows.tarflow.block import TarFlowBlock, TarFlowCache
from jacobiflow.flows.tarflow.model import TarFlow

__all__ = ["TarFlow", "TarFlowBlock", "TarFlowCache", "TarFlowConfig", "TokenConfig"]
