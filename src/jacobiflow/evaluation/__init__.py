"""Quality of a flow and of its samples."""

from jacobiflow.evaluation.differences import (
    PairedError,
    PixelDifference,
    SampleErrors,
    paired_error,
    pixel_difference,
    sample_errors,
)
from jacobiflow.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from jacobiflow.evaluation.features import InceptionFeatures, extract_features, load_features
from jacobiflow.evaluation.likelihood import bayes_accuracy, bits_per_dim

__all__ = [
    "FeatureStatistics", "InceptionFeatures", "PairedError", "PixelDifference", "SampleErrors", "bayes_accuracy",
    "bits_per_dim", "extract_features", "frechet_distance", "kernel_distance", "load_features", "paired_error",
    "pixel_difference", "precision_recall", "sample_errors",
]  # fmt: skip
