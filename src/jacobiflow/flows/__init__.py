"""Flows, the blocks they are made of, and the files they are stored in.

`TarFlow` and `MAF` are registered here; any other flow over images is where its module is imported.
"""

from jacobiflow.flows.base import (
    AffineFrontPerSample,
    ExactInverse,
    Extrapolation,
    FlowBlock,
    FrontPerSample,
    KeepsNothing,
    LowPrecision,
    Replayable,
)
from jacobiflow.flows.config import FlowConfig
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.inspection import problems
from jacobiflow.flows.maf import MAF
from jacobiflow.flows.permutation import Permutation
from jacobiflow.flows.registry import register
from jacobiflow.flows.tarflow import TarFlow

__all__ = [
    "MAF", "AffineFrontPerSample", "ExactInverse", "Extrapolation", "FlowBlock", "FlowConfig", "FrontPerSample",
    "ImageFlow", "KeepsNothing", "LowPrecision", "Permutation", "Replayable", "TarFlow", "problems", "register",
]  # fmt: skip
