"""The public names of the package; `jacobiflow` imports them when the first is used."""

from jacobiflow.adapters import Acceleration, LibraryAcceleration, accelerate
from jacobiflow.calibration import Report, calibrate, find_report
from jacobiflow.codec import register
from jacobiflow.denoising import denoise
from jacobiflow.errors import CheckpointError, InputError
from jacobiflow.flows.base import AffineBlock, Block
from jacobiflow.flows.config import PRESETS, MAFConfig, Preset, TokenConfig
from jacobiflow.flows.flow import load
from jacobiflow.flows.guidance import Guidance, SamplingSettings
from jacobiflow.flows.maf import MAF
from jacobiflow.flows.prose import Prose, ProseConfig
from jacobiflow.flows.starflow import STARFlow, STARFlowConfig
from jacobiflow.flows.tarflow import TarFlow, TarFlowConfig
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
from jacobiflow.strategy import Strategy, Tuning, find_tuning, plan, tune
from jacobiflow.weights import Weights, importance

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
    "LibraryAcceleration",
    "MAFConfig",
    "MaxSweeps",
    "MeanAffine",
    "Partition",
    "Plain",
    "Preset",
    "Prose",
    "ProseConfig",
    "Report",
    "STARFlow",
    "STARFlowConfig",
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
    "TokenConfig",
    "Tolerance",
    "Tuning",
    "Weights",
    "Whole",
    "Window",
    "Zeros",
    "accelerate",
    "calibrate",
    "certify",
    "decode",
    "denoise",
    "find_report",
    "find_tuning",
    "importance",
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
