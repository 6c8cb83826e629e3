"""Maximum-likelihood training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacobiflow.training.config import TrainConfig

if TYPE_CHECKING:
    from jacobiflow.training.folder import TrainMetrics, problems, read_metrics
    from jacobiflow.training.trainer import train
    from jacobiflow.training.transforms import image_transform

__all__ = ["TrainConfig", "TrainMetrics", "image_transform", "problems", "read_metrics", "train"]


def __getattr__(name: str) -> Any:
    """Imports PyTorch only when it is needed; the command line reads the options from `TrainConfig` alone."""
    if name in __all__:
        from jacobiflow.training.folder import TrainMetrics, problems, read_metrics
        from jacobiflow.training.trainer import train
        from jacobiflow.training.transforms import image_transform

        return {each.__name__: each for each in (TrainMetrics, problems, read_metrics, train, image_transform)}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
