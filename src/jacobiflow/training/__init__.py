"""Maximum-likelihood training."""

from jacobiflow.training.folder import StepReport, problems, read_metrics
from jacobiflow.training.trainer import TrainConfig, train

__all__ = ["StepReport", "TrainConfig", "problems", "read_metrics", "train"]
