"""Maximum-likelihood training."""

from jacobiflow.training.folder import TrainMetrics, problems, read_metrics
from jacobiflow.training.trainer import TrainConfig, train

__all__ = ["TrainConfig", "TrainMetrics", "problems", "read_metrics", "train"]
