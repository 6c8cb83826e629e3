"""Quality of a flow and of its samples."""

from jacobiflow.evaluation.differences import (
    ImageErrors,
    PairedError,
    PixelDifference,
    image_errors,
    paired_error,
    pixel_difference,
)
from jacobiflow.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from jacobiflow.evaluation.features import InceptionFeatures, extract_features, load_features
from jacobiflow.evaluation.likelihood import bayes_accuracy, bits_per_dim

__all__ = [
    "FeatureStatistics", "ImageErrors", "InceptionFeatures", "PairedError", "PixelDifference", "bayes_accuracy",
    "bits_per_dim", "extract_features", "frechet_distance", "image_errors", "kernel_distance", "load_features",
    "paired_error", "pixel_difference", "precision_recall",
]  # fmt: skip
