"""Flows, the blocks they are made of, and the files they are stored in.

`TarFlow`, `MAF`, `Prose` and `STARFlow` are registered here, other flows when their modules are imported.
"""

from jacobiflow.blocks.base import FlowBlock
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.models.config import FlowConfig
from jacobiflow.models.flow import Flow
from jacobiflow.models.maf import MAF
from jacobiflow.models.prose import Prose
from jacobiflow.models.registry import register_flow
from jacobiflow.models.starflow import STARFlow
from jacobiflow.models.tarflow import TarFlow
from jacobiflow.models.text_encoder import t5_encoder, word_encoder

__all__ = [
    "MAF",
    "Context",
    "Flow",
    "FlowBlock",
    "FlowConfig",
    "Permutation",
    "Prose",
    "STARFlow",
    "TarFlow",
    "register_flow",
    "t5_encoder",
    "word_encoder",
]  # fmt: skip
