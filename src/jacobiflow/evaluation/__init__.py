"""Quality of a flow and of its samples."""

from jacobiflow.evaluation.distances import Statistics, frechet_distance, kernel_distance, precision_recall
from jacobiflow.evaluation.features import InceptionFeatures, extract, load_features
from jacobiflow.evaluation.fidelity import Fidelity, PixelDifference, fidelity, pixel_difference
from jacobiflow.evaluation.likelihood import bayes_accuracy, bits_per_dim

__all__ = [
    "Fidelity", "InceptionFeatures", "PixelDifference", "Statistics", "bayes_accuracy", "bits_per_dim", "extract",
    "fidelity", "frechet_distance", "kernel_distance", "load_features", "pixel_difference", "precision_recall",
]  # fmt: skip
