"""Maximum-likelihood training."""

from jacobiflow.training.config import TrainConfig
from jacobiflow.training.folder import problems
from jacobiflow.training.metrics import StepReport, read_metrics
from jacobiflow.training.trainer import train

__all__ = ["StepReport", "TrainConfig", "problems", "read_metrics", "train"]
