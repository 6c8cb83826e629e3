"""Labelled images in memory: Fashion-MNIST and MNIST (IDX files), a folder of images, scikit-learn's digits."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGIT_CLASSES = tuple("0123456789")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".tif", ".tiff"})


class DataError(ValueError):
    """A data file or folder that cannot be read as images; the message names it and the mend."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """8-bit images (N, C, H, W), a label (int64) per image or `None`, and the names of the classes.

    **Raises** `DataError` for other types or shapes, and for a dataset without images.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"] | None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            have = f"{images.dtype} of shape {tuple(images.shape)}"
            raise DataError(f"images: {have}; give torch.uint8 of shape (N, C, H, W), none of them 0")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
            have = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise DataError(f"labels: {have}; give torch.int64 of shape ({len(images)},), one per image")

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, index: Tensor | slice) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"] | None]:
        """Images scaled to [-1, 1] and labels at `index`."""
        return scale(self.images[index]), None if self.labels is None else self.labels[index]


def scale(images: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """8-bit values 0 .. 255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def quantize(images: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Images, nominally in [-1, 1], clipped and rounded to 8 bits: the inverse of `scale`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Array of unsigned bytes in an IDX file, plain or gzipped (the format of MNIST and Fashion-MNIST).

    **Raises** `DataError` where the file is not IDX, is not of unsigned bytes, or does not hold what its header says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # Told by its first bytes, for a browser may unpack a file and keep its name.
            return _parse_idx(path, gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip data ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _parse_idx(path: Path, file: io.BufferedIOBase) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08" or magic[3] > 8:
        start = magic.hex(" ") or "nothing"
        raise DataError(
            f"{path}: starts with {start}, not as an IDX file of unsigned bytes and rank 0 to 8; replace it"
        )
    rank = magic[3]
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{path}: truncated inside its header of {4 + 4 * rank} bytes; fetch the file again")
    shape = struct.unpack(f">{rank}I", sizes)
    want, data = math.prod(shape), bytearray()
    while len(data) <= want and (chunk := file.read(1 << 20)):  # never allocates what only the header promises
        data += chunk
    if len(data) != want:
        have = f"{len(data)}" if len(data) < want else "more"
        raise DataError(f"{path}: its header {shape} asks for {want} bytes, it holds {have}; fetch the file again")
    try:
        return np.frombuffer(data, np.uint8).reshape(shape)
    except ValueError as error:
        raise DataError(f"{path}: no array has the shape in its header ({error}); fetch the file again") from error


def fashion_mnist(split: Literal["train", "test"] = "train", folder: str | Path = FASHION_MNIST_FOLDER) -> ImageDataset:
    """Fashion-MNIST from the four IDX files of its original distribution (Debian: dataset-fashion-mnist).

    **Arguments:** `split` is "train" (60,000 images) or "test" (10,000); `folder` holds `train-images-idx3-ubyte` and
    the others, gzipped or not.

    **Raises** `DataError` where a file is missing, broken, or disagrees with its partner.
    """
    stem = {"train": "train", "test": "t10k"}.get(split)
    if stem is None:
        raise DataError(f"split={split!r}: give 'train' or 'test'")
    image_file = _idx_file(Path(folder), f"{stem}-images-idx3-ubyte")
    label_file = _idx_file(Path(folder), f"{stem}-labels-idx1-ubyte")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or not images.size:
        raise DataError(f"{image_file}: shape {images.shape}; give a file of (count, height, width), none of them 0")
    if labels.shape != images.shape[:1]:
        have = f"shape {labels.shape}, but {image_file.name} holds {len(images)} images"
        raise DataError(f"{label_file}: {have}; fetch both files from one source")
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{label_file}: has label {labels.max()}; give labels 0 to {len(FASHION_MNIST_CLASSES) - 1}")
    return ImageDataset(
        torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), FASHION_MNIST_CLASSES
    )


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if os.path.isfile(path):
            return path
    mend = "install Debian's dataset-fashion-mnist, or give a (readable) folder of the IDX files"
    raise DataError(f"{folder}: no {name}[.gz]; {mend}")


def digits() -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, 8x8, their 17 levels stretched to 0 .. 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: needs scikit-learn; pip install 'jacobiflow[eval]'") from error
    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return ImageDataset(images, torch.from_numpy(data.target.astype(np.int64)), DIGIT_CLASSES)


def bundled_fashion() -> ImageDataset:
    """The 512 Fashion-MNIST training images that ship with the package, for demos and calibration."""
    path = resources.files("jacobiflow.data").joinpath("fashion512.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return ImageDataset(
        torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), FASHION_MNIST_CLASSES
    )


def image_folder(folder: str | Path, size: int, channels: int = 3) -> ImageDataset:
    """Every image below `folder`, shorter side resized to `size` and centre-cropped; one class per subfolder.

    Images directly in `folder` have no labels; a folder with both kinds is refused. Classes are the subfolders' names
    in sorted order. Links are followed; hidden files and folders are skipped, and files without an image's suffix.
    `channels` is 3 or 1 (grey). Transparent pixels are blended onto white, 16-bit greys rounded to 8 bits, and an
    orientation in EXIF is not applied.

    **Raises** `DataError` where there is no image, a class has none, or an image is broken, animated, of 32-bit
    pixels, or smaller than `size`.
    """
    root = Path(folder)
    if size < 1 or channels not in (1, 3):
        raise DataError(f"size={size}, channels={channels}: give a positive size, and 1 or 3 channels")
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    try:
        folders, files = _list_folder(root)
        members = {path.name: _files_below(path) for path in folders}
    except OSError as error:
        where = error.filename or root
        raise DataError(f"{where}: cannot be read ({error.strerror}); check its permissions and links") from error
    empty = [name for name, paths in members.items() if not paths]
    labels = None
    if files and len(empty) < len(members):
        raise DataError(f"{root}: {files[0].name} lies beside class folders; move it into one")
    if not files:
        if len(empty) == len(members):
            raise DataError(f"{root}: no image in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        if empty:
            raise DataError(f"{root / empty[0]}: class folder without an image; add some, or remove it")
        files = [path for paths in members.values() for path in paths]
        labels = torch.tensor([label for label, paths in enumerate(members.values()) for _ in paths])
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    for image, path in zip(images, files, strict=True):
        image.copy_(_read_image(path, size, channels))
    return ImageDataset(images, labels, () if labels is None else tuple(members))


def _list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Subfolders and image files directly in `folder`, each in order of name."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            is_image = Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
            if entry.is_dir():
                folders.append(folder / entry.name)
            elif not entry.is_file() and (is_image or entry.is_symlink()):  # would block, or silently lose a class
                raise DataError(f"{entry.path}: neither a file nor a folder (a broken link?); remove it")
            elif is_image:
                files.append(folder / entry.name)
    return folders, files


def _files_below(folder: Path) -> list[Path]:
    folders, files = _list_folder(folder)
    return files + [path for inner in folders for path in _files_below(inner)]


def _read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    try:
        with Image.open(path) as file:
            image = _flatten(file).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # on broken files, Pillow's decoders raise nearly anything
        raise DataError(f"{path}: not a usable image ({error}); replace or remove it") from error
    if min(image.size) < size:
        have = f"{image.width}x{image.height} pixels"
        raise DataError(f"{path}: {have}, smaller than {size}x{size}; remove it, or enlarge it first")
    if min(image.size) > size:
        width, height = (round(side * size / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def _flatten(image: Image.Image) -> Image.Image:
    """One opaque frame of 8 bits."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO is how cameras add a preview to a JPEG
        raise ValueError(f"an animation or stack of {frames} frames")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # which older Pillows say
        # Pillow's own conversion would clip at 255.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def load_images(source: str, size: int, channels: int, split: Literal["train", "test"] = "train") -> ImageDataset:
    """Images by the name that `--images` takes: "fashion-512", "fashion-mnist", "digits", or a folder.

    A folder holds images, or the IDX files of MNIST or a set like it, whose classes are then called "0" to "9".
    `split` chooses among IDX files; the other sources have one part. Images must come out as `channels` x `size` x
    `size`.

    **Raises** `DataError` where the source is unknown, broken, or does not fit the flow.
    """
    if source == "fashion-512":
        data = bundled_fashion()
    elif source == "fashion-mnist":
        data = fashion_mnist(split)
    elif source == "digits":
        data = digits()
    elif not os.path.isdir(source):
        raise DataError(f"--images {source}: neither a folder nor one of fashion-512, fashion-mnist, digits")
    elif any(Path(source).glob("*-idx?-ubyte*")):
        data = replace(fashion_mnist(split, source), classes=DIGIT_CLASSES)
    else:
        data = image_folder(source, size, channels)
    if data.images.shape[1:] != (channels, size, size):
        have, want = "x".join(map(str, data.images.shape[1:])), f"{channels}x{size}x{size}"
        raise DataError(f"--images {source}: images are {have}, the flow takes {want}; give other images or a folder")
    return data


def balanced_labels(num: int, num_classes: int) -> Int[Tensor, " n"]:
    """Labels 0, 1, ..., num_classes-1, 0, 1, ...: label of sample i is i mod num_classes."""
    if num < 0 or num_classes < 1:
        raise DataError(f"num={num}, num_classes={num_classes}: give at least 0 labels, and at least 1 class")
    return torch.arange(num) % num_classes
