"""Images by name: the data sets that this library reads, and folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jacobiflow.checks import check_count
from jacobiflow.data.dataset import DataError, ImageDataset
from jacobiflow.data.emoji import EMOJI_CLASSES, EMOJI_FOLDER, emoji
from jacobiflow.data.folder import image_folder
from jacobiflow.data.idx import DIGIT_CLASSES, Split, idx_folder

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(split: Split = "train", folder: str | Path = FASHION_MNIST_FOLDER) -> ImageDataset:
    """Fashion-MNIST, from the IDX files of its original distribution (Debian: dataset-fashion-mnist).

    **Arguments:** `split` is "train" (60,000 images) or "test" (10,000); see `idx_folder` for `folder` and for errors.
    """
    return idx_folder(folder, split, FASHION_MNIST_CLASSES)


def bundled_fashion() -> ImageDataset:
    """The 512 Fashion-MNIST training images that ship with the package, for demos and calibration."""
    images, labels = _bundled("fashion512.npz")
    return ImageDataset(images.unsqueeze(1), labels, FASHION_MNIST_CLASSES)


def bundled_emoji() -> ImageDataset:
    """The 256 images of `emoji` that ship with the package, all of its training split."""
    return ImageDataset(*_bundled("emoji256.npz"), EMOJI_CLASSES)


def _bundled(name: str) -> tuple[Tensor, Tensor]:
    path = resources.files("jacobiflow.data").joinpath(name)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"].astype(np.int64))


def digits() -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, their 17 levels stretched to 0 .. 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; pip install 'jacobiflow[eval]'") from error
    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return ImageDataset(images, torch.from_numpy(data.target.astype(np.int64)), DIGIT_CLASSES)


SOURCES: dict[str, Callable[[Split], ImageDataset]] = {
    "fashion-512": lambda split: bundled_fashion(),
    "fashion-mnist": fashion_mnist,
    "digits": lambda split: digits(),
    "emoji-256": lambda split: bundled_emoji(),
    "emoji": emoji,
}
"""Data sets by name. A function of the split; one without a test split gives all of its images for either."""

SOURCE_FOLDERS = {"fashion-mnist": FASHION_MNIST_FOLDER, "emoji": EMOJI_FOLDER}
"""Where those that do not ship with a package are read from."""


def load_images(source: str, size: int, channels: int, split: Split = "train") -> ImageDataset:
    """Images from `source`: a name in `SOURCES`, or a folder of images or of IDX files.

    The classes of a folder of IDX files are called "0" to "9". A folder of images has no splits, and its images are
    resized and cropped, see `image_folder`; all others must be `channels` x `size` x `size` as they are.

    **Raises** `DataError` where the source does not exist, is broken, or has images of another shape.
    """
    size, channels = check_count("size", size), check_count("channels", channels)
    if source in SOURCES:
        data = SOURCES[source](split)
    elif not os.path.isdir(source):
        raise DataError(f"{source}: neither a folder nor one of {', '.join(SOURCES)}")
    elif any(Path(source).glob("*-idx?-ubyte*")):
        data = idx_folder(source, split)
    else:
        data = image_folder(source, size, channels)
    if data.images.shape[1:] != (channels, size, size):
        have, want = "x".join(map(str, data.images.shape[1:])), f"{channels}x{size}x{size}"
        raise DataError(f"{source}: images are {have}, the flow takes {want}; give other images or a folder")
    return data
