"""Quality of a flow and of its samples."""

from jacobiflow.evaluation.differences import PixelDifference, SampleErrors, pixel_difference, sample_errors
from jacobiflow.evaluation.distances import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from jacobiflow.evaluation.features import InceptionFeatures, extract_features, load_features
from jacobiflow.evaluation.likelihood import bayes_accuracy, bits_per_dim

__all__ = [
    "FeatureStatistics", "InceptionFeatures", "PixelDifference", "SampleErrors", "bayes_accuracy", "bits_per_dim",
    "extract_features", "frechet_distance", "kernel_distance", "load_features", "pixel_difference",
    "precision_recall", "sample_errors",
]  # fmt: skip
