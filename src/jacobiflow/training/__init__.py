"""Maximum-likelihood training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jacobiflow.training.config import TrainingConfig

if TYPE_CHECKING:
    from jacobiflow.training.folder import TrainMetrics, read_metrics
    from jacobiflow.training.trainer import train
    from jacobiflow.training.transforms import image_transform

__all__ = ["TrainMetrics", "TrainingConfig", "image_transform", "read_metrics", "train"]

_MODULES = {"TrainMetrics": "folder", "read_metrics": "folder", "train": "trainer", "image_transform": "transforms"}


def __getattr__(name: str) -> Any:
    """Imports the modules that need PyTorch when they are used; the command line reads `TrainingConfig` alone."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
