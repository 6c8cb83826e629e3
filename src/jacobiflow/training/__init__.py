"""Maximum-likelihood training."""

from jacobiflow.training.noise import Noise, add_noise
from jacobiflow.training.trainer import StepReport, TrainConfig, read_metrics, train

__all__ = ["Noise", "StepReport", "TrainConfig", "add_noise", "read_metrics", "train"]
