"""TarFlow: its config, the model, its attention over a cache, and the checkpoints of its original code."""

from jacobiflow.flows.tarflow.block import TarFlowBlock
from jacobiflow.flows.tarflow.cache import TarFlowCache
from jacobiflow.flows.tarflow.config import TarFlowConfig
from jacobiflow.flows.tarflow.model import TarFlow

__all__ = ["TarFlow", "TarFlowBlock", "TarFlowCache", "TarFlowConfig"]
