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
from jacobiflow.data.image_files import SUFFIXES, ImageFiles, image_sides, is_grey
from jacobiflow.errors import DataError
from jacobiflow.utils.checks import check_choice, check_count
from jacobiflow.utils.files import regular_file

Split: TypeAlias = Literal["train", "test"]

_BUNDLED = {"fashion-512": "fashion512.npz", "emoji-256": "emoji256.npz"}
_NAMES = (*_BUNDLED, "fashion-mnist", "digits")
_SPLITS: dict[str, tuple[Split, ...]] = {"fashion-mnist": ("train", "test"), "digits": ()}
_IDX_STEMS: dict[Split, str] = {"train": "train", "test": "t10k"}  # First word of the names of IDX files.
_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_CLASSES = {
    "fashion": (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
    ),
    "emoji": ("face", "person", "gesture", "profession", "fantasy", "hand"),
}  # fmt: skip


def load_images(
    source: str, size: int | None = None, channels: int | None = None, split: Split = "train"
) -> ImageDataset:
    """Loads a data set by its name, or images from a file or folder.

    Args:
        source: "fashion-512" or "emoji-256" (training images in the package), "fashion-mnist" (Debian's package
            dataset-fashion-mnist), "digits" (scikit-learn's), or a path: an .npz file with `images` (N, H, W) or
            (N, C, H, W) and optional `labels` (N,), a folder of IDX files (MNIST's format), or a folder of images, see
            `image_folder`.
        size: Side of the images in pixels; by default as they are. Only images of a folder are resized.
        channels: 3 for colour, 1 for grey; by default as they are.
        split: "train" or "test". "train" loads all images of a source without splits, see `available_splits`.

    Example:
        >>> data = load_images("fashion-512", size=28, channels=1)
        >>> data.images.shape, data.labels.bincount().tolist()
        (torch.Size([512, 1, 28, 28]), [52, 52, 51, 51, 51, 51, 51, 51, 51, 51])
    """
    size = None if size is None else check_count("size", size)
    channels = None if channels is None else check_count("channels", channels)
    check_choice("split", split, ("train", "test"))
    if split == "test" and "test" not in available_splits(source):
        raise DataError(f"{source}: has no test split; give split='train', or fashion-mnist or a folder of IDX files")
    if source == "digits":
        data = digits()
    elif source in _BUNDLED:
        with resources.as_file(resources.files("jacobiflow.data") / _BUNDLED[source]) as file:
            data = _npz_file(file)
    elif source == "fashion-mnist":
        data = idx_folder(_FASHION_MNIST, split)
    elif source.endswith(".npz"):
        data = _npz_file(Path(source))
    elif not os.path.isdir(source):
        raise DataError(f"{source}: neither an .npz file, a folder, nor one of {', '.join(_NAMES)}")
    elif available_splits(source):
        data = idx_folder(source, split)
    else:
        data = image_folder(source, size, channels)
    if source in (*_BUNDLED, "fashion-mnist"):
        data = replace(data, classes=_CLASSES[source.partition("-")[0]])
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
    if source in _NAMES:
        return _SPLITS.get(source, ("train",))
    return tuple(split for split, stem in _IDX_STEMS.items() if any(Path(source).glob(f"{stem}-*-idx?-ubyte*")))


def digits() -> ImageDataset:
    """Loads scikit-learn's 1,797 handwritten digits of 8x8 pixels, with values scaled from 0 .. 16 to 0 .. 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; pip install 'jacobiflow[eval]'") from error
    data = load_digits()
    return _dataset("digits", np.rint(data.images * (255 / 16)).astype(np.uint8), data.target)


def idx_folder(folder: str | Path, split: Split = "train") -> ImageDataset:
    """Reads MNIST or another data set in its format.

    Args:
        folder: A folder with `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or the files `t10k-...` of the
            test split. Files may be gzipped.
    """
    stem = _IDX_STEMS[split]
    images = _idx_file(Path(folder), f"{stem}-images-idx3-ubyte")
    return _dataset(folder, images, _idx_file(Path(folder), f"{stem}-labels-idx1-ubyte"))


def _idx_file(folder: Path, name: str) -> NDArray[np.uint8]:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no {name}[.gz] (Debian's dataset-fashion-mnist installs Fashion-MNIST)")
    try:
        data = path.read_bytes()
        # A browser may unpack a file and keep its name, so the first bytes tell whether it is gzipped.
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if data[:3] != b"\0\0\x08":
            raise DataError(f"starts with {data[:4].hex(' ') or 'nothing'}, not as an IDX file of unsigned bytes")
        shape = np.frombuffer(data, ">u4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except Exception as error:
        raise DataError(f"{path}: broken ({error}); fetch the file again") from error


def _npz_file(path: Path) -> ImageDataset:
    try:
        with np.load(regular_file(path), allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays.get("labels")
    except Exception as error:
        raise DataError(f"{path}: no .npz file with images and labels ({error})") from error
    return _dataset(path, images, labels)


def _dataset(source: object, images: NDArray[np.uint8], labels: NDArray[np.integer] | None) -> ImageDataset:
    try:
        return ImageDataset(
            torch.from_numpy(images[:, None] if images.ndim == 3 else images),
            None if labels is None else torch.from_numpy(labels.astype(np.int64, casting="same_kind")),
        )
    except (DataError, TypeError) as error:
        raise DataError(f"{source}: {error}") from error


def image_folder(folder: str | Path, size: int | None = None, channels: int | None = 3) -> ImageDataset:
    """Finds all images below a folder; each subfolder is a class. An image is read when it is needed.

    The shorter side of an image is resized to `size`, and the centre is cropped. Transparent pixels are blended onto
    white, 16-bit greys are rounded to 8 bits, and an orientation in EXIF is ignored. Links are followed. Hidden files
    and files without an image suffix are skipped. Images and classes are sorted by name.

    Args:
        folder: A folder with images, which have no labels, or with subfolders of images.
        size: Side of the images in pixels; by default the smallest side of all images.
        channels: 3 for colour, 1 for grey; None for colour unless all images are grey.

    Raises:
        DataError: If there is no image, a class has no image, or images lie beside class folders. Also when an image
            is read that is broken, animated, of 32-bit pixels or smaller than `size`.
    """
    root = Path(folder)
    size, channels = size and check_count("size", size), channels and check_choice("channels", channels, (1, 3))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    paths = map(Path, glob("**/*", root_dir=root, recursive=True))  # Hidden files and folders are left out.
    names = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not names:
        raise DataError(f"{root}: no image in it (looked for {', '.join(sorted(SUFFIXES))})")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    direct = [name for name in names if len(name.parts) == 1]
    if direct and len(direct) < len(names):
        raise DataError(f"{root}: {direct[0]} lies beside class folders; move it into one")
    numbers = {} if direct else {name: number for number, name in enumerate(classes)}
    for name in sorted(numbers.keys() - {path.parts[0] for path in names}):
        raise DataError(f"{root / name}: class folder without an image; add some, or remove it")
    files = tuple(root / name for name in names)
    if size is None:
        size = min(min(image_sides(file)) for file in files)
    if channels is None:
        channels = 1 if all(map(is_grey, files)) else 3
    images = ImageFiles(files, size, channels)
    images[0]  # Raises an error for too large a size.
    labels = torch.tensor([numbers[name.parts[0]] for name in names]) if numbers else None
    return ImageDataset(images, labels, tuple(numbers))
