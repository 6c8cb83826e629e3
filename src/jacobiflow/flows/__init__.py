"""Flows, the blocks they are made of, and the files they are stored in.

`TarFlow`, `MAF`, `Prose` and `STARFlow` are registered here, other flows when their modules are imported.
"""

from jacobiflow.flows.base import AttentionContext, FlowBlock, Permutation
from jacobiflow.flows.config import FlowConfig
from jacobiflow.flows.flow import Flow, register
from jacobiflow.flows.maf import MAF
from jacobiflow.flows.prose import Prose
from jacobiflow.flows.starflow import STARFlow
from jacobiflow.flows.tarflow import TarFlow
from jacobiflow.flows.text import t5_encoder

__all__ = [
    "MAF",
    "AttentionContext",
    "Flow",
    "FlowBlock",
    "FlowConfig",
    "Permutation",
    "Prose",
    "STARFlow",
    "TarFlow",
    "register",
    "t5_encoder",
]  # fmt: skip
