"""Fast, certified sampling from autoregressive normalizing flows."""

from jacobiflow import launch  # noqa: F401  before PyTorch, see there
from jacobiflow.adapters import Acceleration, accelerate
from jacobiflow.calibration import Report, Tuning, calibrate, find_report, tune
from jacobiflow.codec import register
from jacobiflow.denoising import denoise
from jacobiflow.errors import InputError
from jacobiflow.flows.base import AffineBlock, Block
from jacobiflow.flows.maf import MAF, MAFConfig
from jacobiflow.flows.presets import PRESETS, Preset
from jacobiflow.flows.registry import load
from jacobiflow.flows.settings import SamplingSettings
from jacobiflow.flows.tarflow import TarFlow, TarFlowConfig
from jacobiflow.flows.weights import CheckpointError
from jacobiflow.guidance import Guidance
from jacobiflow.sampling import Samples, decode, sample
from jacobiflow.solvers import (
    CausalLinear,
    Chord,
    Correction,
    EarlyStop,
    Guess,
    Latent,
    MaxSweeps,
    MeanAffine,
    Partition,
    Plain,
    Segments,
    Sequential,
    SlidingRun,
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
from jacobiflow.storage import SampleFolder, processes, sample_to_folder
from jacobiflow.strategy import Strategy, plan

__version__ = "0.1.0"

__all__ = [
    "MAF",
    "PRESETS",
    "Acceleration",
    "AffineBlock",
    "Block",
    "CausalLinear",
    "CheckpointError",
    "Chord",
    "Correction",
    "EarlyStop",
    "Guess",
    "Guidance",
    "InputError",
    "Latent",
    "MAFConfig",
    "MaxSweeps",
    "MeanAffine",
    "Partition",
    "Plain",
    "Preset",
    "Report",
    "SampleFolder",
    "Samples",
    "SamplingSettings",
    "Segments",
    "Sequential",
    "SlidingRun",
    "Solution",
    "Solver",
    "Status",
    "Strategy",
    "TarFlow",
    "TarFlowConfig",
    "Tolerance",
    "Tuning",
    "Whole",
    "Window",
    "Zeros",
    "accelerate",
    "calibrate",
    "certify",
    "decode",
    "denoise",
    "find_report",
    "load",
    "plan",
    "processes",
    "register",
    "sample",
    "sample_to_folder",
    "solve",
    "solve_certified",
    "tune",
]
