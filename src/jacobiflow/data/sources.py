"""Image data sets by name, and images from files and folders."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from glob import glob
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from jacobiflow.data.dataset import ImageDataset
from jacobiflow.data.image_files import SUFFIXES, ImageFiles, natural_shape
from jacobiflow.errors import DataError
from jacobiflow.utils.checks import check_choice, check_count

Split: TypeAlias = Literal["train", "test"]

_FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
_EMOJI = ("face", "person", "gesture", "profession", "fantasy", "hand")
_BUNDLED = {"fashion-512": ("fashion512.npz", _FASHION), "emoji-256": ("emoji256.npz", _EMOJI)}
_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_IDX_STEMS: dict[Split, str] = {"train": "train", "test": "t10k"}  # First word of the names of IDX files.


def load_images(
    source: str, size: int | None = None, channels: int | None = None, split: Split = "train"
) -> ImageDataset:
    """Loads a data set by its name, or images from a file or folder.

    In a folder of images each subfolder is a class; images that lie in the folder itself have no labels. Images and
    classes are sorted by name. Links are followed; hidden files, and files without an image suffix, are skipped. An
    image is read when it is needed. Its shorter side is resized to `size`, and the centre is cropped. Transparent
    pixels are blended onto white, and photos are turned upright as their EXIF data say.

    Args:
        source: "fashion-512" or "emoji-256" (training images in the package), "fashion-mnist" (Debian's package
            dataset-fashion-mnist), "digits" (scikit-learn's), or a path: an .npz file with `images` (N, H, W) or
            (N, C, H, W) and optional `labels` (N,), a folder of IDX files (MNIST's format), or a folder of images.
        size: Side of the images in pixels; by default as they are, and for a folder of images the smallest side of all.
        channels: 3 for colour, 1 for grey; by default as they are, and for a folder of images colour unless all are
            grey.
        split: "train" or "test". "train" loads all images of a source without splits, see `available_splits`.

    Raises:
        DataError: If the source cannot be read, or its images have another size or number of channels. Also when an
            image of a folder is read that is broken, has more than 8 bits per value, or is smaller than `size`.

    Example:
        >>> data = load_images("fashion-512", size=28, channels=1)
        >>> data.images.shape, data.labels.bincount().tolist()
        (torch.Size([512, 1, 28, 28]), [52, 52, 51, 51, 51, 51, 51, 51, 51, 51])
    """
    size = None if size is None else check_count("size", size)
    channels = None if channels is None else check_count("channels", channels)
    check_choice("split", split, ("train", "test"))
    splits = available_splits(source)
    if split == "test" and "test" not in splits:
        raise DataError(f"{source}: has no test split; give split='train', or fashion-mnist or a folder of IDX files")
    if source == "digits":
        data = digits()
    elif source in _BUNDLED:
        name, classes = _BUNDLED[source]
        with resources.as_file(resources.files("jacobiflow.data") / name) as file:
            data = replace(_read_npz(file), classes=classes)
    elif source == "fashion-mnist":
        data = replace(_read_idx(_FASHION_MNIST, split), classes=_FASHION)
    elif source.endswith(".npz"):
        data = _read_npz(Path(source))
    elif not os.path.isdir(source):
        names = ", ".join((*_BUNDLED, "fashion-mnist", "digits"))
        raise DataError(f"{source}: neither an .npz file, a folder, nor one of {names}")
    elif splits:
        data = _read_idx(Path(source), split)
    else:
        data = _read_folder(Path(source), size, channels)
    have = tuple(data.images.shape[1:])
    want = (have[0] if channels is None else channels, *((have[1],) * 2 if size is None else (size, size)))
    if have != want:
        have_text, want_text = ("x".join(map(str, shape)) for shape in (have, want))
        raise DataError(f"{source}: images are {have_text}, not {want_text}; give other images or a folder")
    return data


def available_splits(source: str) -> tuple[Split, ...]:
    """Returns the splits of a source of `load_images`; an empty tuple if it has no separate test images.

    Example:
        >>> available_splits("fashion-512"), available_splits("fashion-mnist"), available_splits("digits")
        (('train',), ('train', 'test'), ())
    """
    if source in _BUNDLED or source == "fashion-mnist":
        return ("train",) if source in _BUNDLED else ("train", "test")
    return tuple(split for split, stem in _IDX_STEMS.items() if any(Path(source).glob(f"{stem}-*-idx?-ubyte*")))


def digits() -> ImageDataset:
    """Loads scikit-learn's 1,797 handwritten digits of 8x8 pixels, with values scaled from 0 .. 16 to 0 .. 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; pip install scikit-learn") from error
    data = load_digits()
    return _labelled("digits", np.rint(data.images * (255 / 16)).astype(np.uint8), data.target)


def _read_idx(folder: Path, split: Split) -> ImageDataset:
    """Reads a split of MNIST or of another data set in its format."""
    parts = ("images-idx3", "labels-idx1")
    images, labels = (_read_idx_file(folder / f"{_IDX_STEMS[split]}-{part}-ubyte") for part in parts)
    return _labelled(folder, images, labels)


def _read_idx_file(path: Path) -> NDArray[np.uint8]:
    """Reads an array from a file of an IDX folder, which may be gzipped."""
    gzipped = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not gzipped.is_file():
        raise DataError(f"{path}[.gz]: missing (Debian's dataset-fashion-mnist installs Fashion-MNIST)")
    try:
        data = path.read_bytes() if path.is_file() else gzip.decompress(gzipped.read_bytes())
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        shape = np.frombuffer(data, ">u4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path}[.gz]: broken ({error}); fetch the file again") from error


def _read_npz(path: Path) -> ImageDataset:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays.get("labels")
    except Exception as error:
        raise DataError(f"{path}: no .npz file with images and labels ({error})") from error
    return _labelled(path, images, labels)


def _labelled(source: object, images: NDArray[np.uint8], labels: NDArray[np.integer] | None) -> ImageDataset:
    """Returns grey images (N, H, W) or images (N, C, H, W) with their labels; an error names the source."""
    try:
        return ImageDataset(
            torch.from_numpy(images[:, None] if images.ndim == 3 else images),
            None if labels is None else torch.from_numpy(labels.astype(np.int64, casting="same_kind")),
        )
    except (DataError, TypeError) as error:
        raise DataError(f"{source}: {error}") from error


def _read_folder(folder: Path, size: int | None, channels: int | None) -> ImageDataset:
    """Finds all images below a folder; an image is read when it is needed."""
    if channels is not None:
        check_choice("channels", channels, (1, 3))
    paths = map(Path, glob("**/*", root_dir=folder, recursive=True))  # Hidden files and folders are left out.
    names = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not names:
        raise DataError(f"{folder}: no image in it (looked for {', '.join(sorted(SUFFIXES))})")
    classes = sorted({name.parts[0] for name in names if len(name.parts) > 1})
    direct = [name for name in names if len(name.parts) == 1]
    if direct and classes:
        raise DataError(f"{folder}: {direct[0]} lies beside class folders; move it into one")
    files = tuple(folder / name for name in names)
    if size is None or channels is None:
        natural_size, natural_channels = natural_shape(files)
        size, channels = size or natural_size, channels or natural_channels
    images = ImageFiles(files, size, channels)
    images[0]  # Raises an error for too large a size.
    labels = torch.tensor([classes.index(name.parts[0]) for name in names], device="cpu") if classes else None
    return ImageDataset(images, labels, tuple(classes))
