"""Flows, the blocks they are made of, and the files they are stored in.

`TarFlow`, `MAF` and `Prose` are registered here, other flows when their modules are imported.
"""

from jacobiflow.flows.base import AttentionContext, FlowBlock, Permutation
from jacobiflow.flows.config import FlowConfig
from jacobiflow.flows.flow import Flow, register
from jacobiflow.flows.maf import MAF
from jacobiflow.flows.prose import Prose
from jacobiflow.flows.tarflow import TarFlow

__all__ = [
    "MAF",
    "AttentionContext",
    "Flow",
    "FlowBlock",
    "FlowConfig",
    "Permutation",
    "Prose",
    "TarFlow",
    "register",
]  # fmt: skip
