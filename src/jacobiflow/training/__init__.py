"""Maximum-likelihood training."""

from jacobiflow.training.trainer import StepReport, TrainConfig, read_metrics, train

__all__ = ["StepReport", "TrainConfig", "read_metrics", "train"]
