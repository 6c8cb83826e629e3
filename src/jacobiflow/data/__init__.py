"""Labelled images, and the noise and augmentation of training images."""

from jacobiflow.data.augmentation import Augmentation, Noise, add_noise, augment, noisy_images
from jacobiflow.data.dataset import DataError, ImageDataset, balanced_labels, quantize, scale
from jacobiflow.data.grid import image_grid
from jacobiflow.data.sources import Split, available_splits, digits, idx_folder, image_folder, load_images

__all__ = [
    "Augmentation", "DataError", "ImageDataset", "Noise", "Split", "add_noise", "augment", "available_splits",
    "balanced_labels", "digits", "idx_folder", "image_folder", "image_grid", "load_images", "noisy_images", "quantize",
    "scale",
]  # fmt: skip
