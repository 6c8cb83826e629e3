"""Maximum-likelihood training."""

from jacobiflow.training.noise import Noise, add_noise, noisy_images
from jacobiflow.training.trainer import StepReport, TrainConfig, read_metrics, train

__all__ = ["Noise", "StepReport", "TrainConfig", "add_noise", "noisy_images", "read_metrics", "train"]
