"""Labelled images, and the noise that training adds to them."""

from jacobiflow.data.dataset import ImageDataset, balanced_labels, quantize, scale
from jacobiflow.data.grid import image_grid
from jacobiflow.data.image_files import ImageFiles, read_image
from jacobiflow.data.noise import Noise, noisy_images
from jacobiflow.data.sources import Split, available_splits, digits, load_images
from jacobiflow.errors import DataError

__all__ = [
    "DataError", "ImageDataset", "ImageFiles", "Noise", "Split", "available_splits", "balanced_labels", "digits",
    "image_grid", "load_images", "noisy_images", "quantize", "read_image", "scale",
]  # fmt: skip
