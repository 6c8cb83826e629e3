"""Fast, certified sampling from autoregressive normalizing flows."""

from jacobiflow.calibration import Report, calibrate
from jacobiflow.denoising import denoise
from jacobiflow.flows.base import AffineBlock, Block
from jacobiflow.flows.checkpoints import CheckpointError, load
from jacobiflow.flows.presets import PRESETS, Preset
from jacobiflow.flows.tarflow import TarFlow, TarFlowConfig
from jacobiflow.guidance import Guidance
from jacobiflow.sampling import Samples, decode, sample
from jacobiflow.solvers import (
    Latent,
    MaxSweeps,
    MeanAffine,
    Plain,
    Segments,
    Sequential,
    Solution,
    Solver,
    Status,
    Tolerance,
    Whole,
    Window,
    Zeros,
    certify,
    solve,
    solve_certified,
)
from jacobiflow.strategy import Strategy

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AffineBlock",
    "Block",
    "CheckpointError",
    "Guidance",
    "Latent",
    "MaxSweeps",
    "MeanAffine",
    "Plain",
    "Preset",
    "Report",
    "Samples",
    "Segments",
    "Sequential",
    "Solution",
    "Solver",
    "Status",
    "Strategy",
    "TarFlow",
    "TarFlowConfig",
    "Tolerance",
    "Whole",
    "Window",
    "Zeros",
    "calibrate",
    "certify",
    "decode",
    "denoise",
    "load",
    "sample",
    "solve",
    "solve_certified",
]
