"""Maximum-likelihood training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacobiflow.training.config import TrainingConfig
from jacobiflow.utils.deprecation import find_renamed

if TYPE_CHECKING:
    from jacobiflow.training.folder import TrainMetrics, read_metrics
    from jacobiflow.training.trainer import train
    from jacobiflow.training.transforms import image_transform

__all__ = ["TrainMetrics", "TrainingConfig", "image_transform", "read_metrics", "train"]
_RENAMED = {"StepReport": "TrainMetrics", "TrainConfig": "TrainingConfig"}


def __getattr__(name: str) -> Any:
    """Imports the modules that need PyTorch when they are used; the command line reads `TrainingConfig` alone."""
    if name in __all__:
        from jacobiflow.training import folder, trainer, transforms

        return {**vars(folder), **vars(trainer), **vars(transforms)}[name]
    return find_renamed(__name__, _RENAMED, name)
