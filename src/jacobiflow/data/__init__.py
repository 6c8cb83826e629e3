"""Labelled images in memory, and the noise that training adds to them."""

from jacobiflow.data.augmentation import Augmentation, augment
from jacobiflow.data.dataset import DataError, ImageDataset, balanced_labels, quantize, scale
from jacobiflow.data.emoji import EMOJI_CLASSES, emoji
from jacobiflow.data.folder import image_folder
from jacobiflow.data.idx import idx_folder, read_idx
from jacobiflow.data.noise import Noise, add_noise, noisy_images
from jacobiflow.data.sources import (
    FASHION_MNIST_CLASSES,
    SOURCES,
    bundled_emoji,
    bundled_fashion,
    digits,
    fashion_mnist,
    load_images,
)

__all__ = [
    "EMOJI_CLASSES", "FASHION_MNIST_CLASSES", "SOURCES", "Augmentation", "DataError", "ImageDataset", "Noise",
    "add_noise", "augment", "balanced_labels", "bundled_emoji", "bundled_fashion", "digits", "emoji", "fashion_mnist",
    "idx_folder", "image_folder", "load_images", "noisy_images", "quantize", "read_idx", "scale",
]  # fmt: skip
