"""Labelled images in memory, and the noise that training adds to them."""

from jacobiflow.data.dataset import DataError, ImageDataset, balanced_labels, quantize, scale
from jacobiflow.data.folder import image_folder
from jacobiflow.data.idx import idx_folder, read_idx
from jacobiflow.data.noise import Noise, add_noise, noisy_images
from jacobiflow.data.sources import (
    FASHION_MNIST_CLASSES,
    SOURCES,
    bundled_fashion,
    digits,
    fashion_mnist,
    load_images,
)

__all__ = [
    "FASHION_MNIST_CLASSES", "SOURCES", "DataError", "ImageDataset", "Noise", "add_noise", "balanced_labels",
    "bundled_fashion", "digits", "fashion_mnist", "idx_folder", "image_folder", "load_images", "noisy_images",
    "quantize", "read_idx", "scale",
]  # fmt: skip
