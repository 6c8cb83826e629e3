"""How good a flow is."""

from jacobiflow.evaluation.likelihood import bayes_accuracy, bits_per_dim

__all__ = ["bayes_accuracy", "bits_per_dim"]
