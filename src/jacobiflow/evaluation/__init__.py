"""Quality of a flow and of its samples."""

from jacobiflow.evaluation.distances import (
    Fidelity,
    PixelDifference,
    Statistics,
    fidelity,
    frechet_distance,
    kernel_distance,
    pixel_difference,
    precision_recall,
)
from jacobiflow.evaluation.features import InceptionFeatures, extract, load_features
from jacobiflow.evaluation.likelihood import bayes_accuracy, bits_per_dim

__all__ = [
    "Fidelity", "InceptionFeatures", "PixelDifference", "Statistics", "bayes_accuracy", "bits_per_dim", "extract",
    "fidelity", "frechet_distance", "kernel_distance", "load_features", "pixel_difference", "precision_recall",
]  # fmt: skip
