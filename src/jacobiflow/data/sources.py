"""Images by the name of a data set, or from a file or folder."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from jacobiflow.checks import check_choice, check_count
from jacobiflow.data.dataset import DataError, ImageDataset
from jacobiflow.data.folder import image_folder

Split: TypeAlias = Literal["train", "test"]

BUNDLED = {"fashion-512": "fashion512.npz", "emoji-256": "emoji256.npz"}
SOURCES = (*BUNDLED, "fashion-mnist", "digits")
"""Names of data sets. Those that ship with the package, and the digits, have no test split."""

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_BROKEN = (OSError, EOFError, LookupError, TypeError, ValueError, zlib.error, zipfile.BadZipFile)


def load_images(source: str, size: int, channels: int, split: Split = "train") -> ImageDataset:
    """Loads images by the name of a data set, or from a file or folder.

    Args:
        source: "fashion-512" or "emoji-256" (training images that ship with the package), "fashion-mnist" (Debian's
            dataset-fashion-mnist), "digits" (scikit-learn's), an .npz file with `images` (N, H, W) or (N, C, H, W) and
            perhaps `labels` (N,), or a folder of IDX files (MNIST's format) or of images; see `image_folder`.
        size: Side of the images in pixels; only images of a folder are resized.
        channels: 3, or 1 for grey.
        split: Only "fashion-mnist" and IDX files have a test split; of other sources, all images are returned.

    Example:
        >>> data = load_images("fashion-512", size=28, channels=1)
        >>> data.images.shape, data.labels.bincount().tolist()
        (torch.Size([512, 1, 28, 28]), [52, 52, 51, 51, 51, 51, 51, 51, 51, 51])
    """
    size, channels = check_count("size", size), check_count("channels", channels)
    check_choice("split", split, ("train", "test"))
    if source == "digits":
        data = digits()
    elif source in BUNDLED:
        with resources.as_file(resources.files("jacobiflow.data") / BUNDLED[source]) as file:
            data = _npz_file(file)
    elif source == "fashion-mnist":
        data = idx_folder(FASHION_MNIST_FOLDER, split)
    elif source.endswith(".npz"):
        data = _npz_file(Path(source))
    elif not os.path.isdir(source):
        raise DataError(f"{source}: neither an .npz file, a folder, nor one of {', '.join(SOURCES)}")
    elif any(Path(source).glob("*-idx?-ubyte*")):
        data = idx_folder(source, split)
    else:
        data = image_folder(source, size, channels)
    if data.images.shape[1:] != (channels, size, size):
        have, want = "x".join(map(str, data.images.shape[1:])), f"{channels}x{size}x{size}"
        raise DataError(f"{source}: images are {have}, the flow takes {want}; give other images or a folder")
    return data


def digits() -> ImageDataset:
    """Loads scikit-learn's 1,797 handwritten digits, 8x8, their 17 levels stretched to 0 .. 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; pip install 'jacobiflow[eval]'") from error
    data = load_digits()
    return _dataset("digits", np.rint(data.images * (255 / 16)).astype(np.uint8), data.target)


def idx_folder(folder: str | Path, split: Split = "train") -> ImageDataset:
    """Reads MNIST, or a data set in the same files.

    Args:
        folder: Holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, and two files `t10k-...` of the test split;
            each gzipped or not.
        split: "train" or "test".
    """
    stem = {"train": "train", "test": "t10k"}[split]
    images = _idx_file(Path(folder), f"{stem}-images-idx3-ubyte")
    return _dataset(folder, images, _idx_file(Path(folder), f"{stem}-labels-idx1-ubyte"))


def _idx_file(folder: Path, name: str) -> NDArray[np.uint8]:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no {name}[.gz] (Debian's dataset-fashion-mnist installs Fashion-MNIST)")
    try:
        data = path.read_bytes()
        # The first bytes decide, not the name: a browser may unpack a file and keep its name.
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if data[:3] != b"\0\0\x08":
            raise DataError(f"starts with {data[:4].hex(' ') or 'nothing'}, not as an IDX file of unsigned bytes")
        shape = np.frombuffer(data, ">u4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except _BROKEN as error:
        raise DataError(f"{path}: broken ({error}); fetch the file again") from error


def _npz_file(path: Path) -> ImageDataset:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["labels"].astype(np.int64, casting="same_kind") if "labels" in arrays else None
            images = arrays["images"]
    except _BROKEN as error:
        raise DataError(f"{path}: no .npz file with images and labels ({error})") from error
    return _dataset(path, images, labels)


def _dataset(source: object, images: NDArray[np.uint8], labels: NDArray[np.integer] | None) -> ImageDataset:
    try:
        return ImageDataset(
            torch.from_numpy(images[:, None] if images.ndim == 3 else images),
            None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        )
    except (DataError, TypeError) as error:
        raise DataError(f"{source}: {error}") from error
