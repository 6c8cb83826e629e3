"""Labelled images in memory."""

from jacobiflow.data.dataset import (
    FASHION_MNIST_CLASSES,
    DataError,
    ImageDataset,
    balanced_labels,
    bundled_fashion,
    digits,
    fashion_mnist,
    image_folder,
    load_images,
    quantize,
    read_idx,
    scale,
)
from jacobiflow.data.noise import Noise, add_noise, noisy_images

__all__ = [
    "FASHION_MNIST_CLASSES", "DataError", "ImageDataset", "Noise", "add_noise", "balanced_labels", "bundled_fashion",
    "digits", "fashion_mnist", "image_folder", "load_images", "noisy_images", "quantize", "read_idx", "scale",
]  # fmt: skip
