"""The public names of the package; `jacobiflow` imports them when the first is used."""

from jacobiflow.adapters import Acceleration, LibraryAcceleration, accelerate
from jacobiflow.blocks.base import AffineBlock, AttentionBlock, Block
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import Guidance, SamplingSettings
from jacobiflow.calibration import CalibrationReport, calibrate, find_report
from jacobiflow.errors import CheckpointError, InputError, UnsupportedError
from jacobiflow.fixed_point import (
    Bf16Sweeps,
    Guess,
    Latent,
    Partition,
    Segments,
    Sequential,
    SlidingRun,
    Solution,
    Solver,
    Status,
    Stopping,
    WarmStart,
    Whole,
    Window,
    Zeros,
    solve,
)
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import register_piece
from jacobiflow.models.maf import MAF, MAFConfig
from jacobiflow.models.presets import PRESETS, Preset
from jacobiflow.models.prose import Prose, ProseConfig
from jacobiflow.models.registry import load
from jacobiflow.models.starflow import STARFlow, STARFlowConfig
from jacobiflow.models.tarflow import TarFlow, TarFlowConfig, TokenConfig
from jacobiflow.planner import Strategy, plan
from jacobiflow.sampling.denoise import denoise
from jacobiflow.sampling.folder import SampleFolder, sample_to_folder
from jacobiflow.sampling.importance import ImportanceWeights, importance
from jacobiflow.sampling.result import Samples
from jacobiflow.sampling.sample import decode, sample

__all__ = [
    "MAF",
    "PRESETS",
    "Acceleration",
    "AffineBlock",
    "AttentionBlock",
    "Bf16Sweeps",
    "Block",
    "CalibrationReport",
    "CheckpointError",
    "Context",
    "Guess",
    "Guidance",
    "ImportanceWeights",
    "InputError",
    "Latent",
    "LibraryAcceleration",
    "MAFConfig",
    "Partition",
    "Preset",
    "Problem",
    "Prose",
    "ProseConfig",
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
    "Stopping",
    "Strategy",
    "TarFlow",
    "TarFlowConfig",
    "TokenConfig",
    "UnsupportedError",
    "WarmStart",
    "Whole",
    "Window",
    "Zeros",
    "accelerate",
    "calibrate",
    "decode",
    "denoise",
    "find_report",
    "importance",
    "load",
    "plan",
    "register_piece",
    "sample",
    "sample_to_folder",
    "solve",
]
