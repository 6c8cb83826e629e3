"""Folders of image files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jacobiflow.checks import check_choice, check_count
from jacobiflow.data.dataset import LIMIT, DataError, ImageDataset, check_room
from jacobiflow.errors import InputValueError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".tif", ".tiff"})
_DEEPEST = 1000  # levels of folders


def image_folder(folder: str | Path, size: int, channels: int = 3) -> ImageDataset:
    """Every image below `folder`, shorter side resized to `size` and centre-cropped; one class per subfolder.

    Images directly in `folder` have no labels; a folder with both kinds is refused. Classes are the subfolders' names
    in sorted order. Links are followed; hidden files and folders are skipped, and files without an image's suffix.
    `channels` is 3 or 1 (grey). Transparent pixels are blended onto white, 16-bit greys rounded to 8 bits, and an
    orientation in EXIF is not applied. There may be 10,000,000 files and folders, and 1,000 levels of folders.

    **Raises** `DataError` where there is no image, a class has none, an image is broken, animated, of 32-bit pixels, or
    smaller than `size`, or there are more than these limits or the memory allow.
    """
    root = Path(folder)
    size = check_count("size", size)
    channels = check_choice("channels", channels, (1, 3))
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
    read_image(files[0], size, channels)  # whose message is better where `size` is far too large
    check_room(root, len(files), channels, size, size)
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    for image, path in zip(images, files, strict=True):
        image.copy_(read_image(path, size, channels))
    return ImageDataset(images, labels, () if labels is None else tuple(members))


def _list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Subfolders and image files directly in `folder`, each in order of name."""
    folders: list[Path] = []
    files: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if len(folders) + len(files) == LIMIT:
                raise DataError(f"{folder}: the limit is {LIMIT:,} files and folders; give fewer images")
            is_image = Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
            if entry.is_dir():
                folders.append(folder / entry.name)
            elif not entry.is_file() and (is_image or entry.is_symlink()):  # would block, or silently lose a class
                raise DataError(f"{entry.path}: neither a file nor a folder (a broken link?); remove it")
            elif is_image:
                files.append(folder / entry.name)
    return folders, files


def _files_below(folder: Path) -> list[Path]:
    """All image files below `folder`: its own, then those of its subfolders, each in order of name."""
    found: list[Path] = []
    waiting, looked = [(folder, 1)], 0
    while waiting:
        place, level = waiting.pop()
        folders, files = _list_folder(place)
        found += files
        looked += len(folders) + len(files)
        if looked > LIMIT:
            raise DataError(f"{folder}: the limit is {LIMIT:,} files and folders; give fewer images")
        if folders and level == _DEEPEST:
            raise DataError(f"{folder}: the limit is {_DEEPEST:,} levels of folders; move the images up")
        waiting += ((inner, level + 1) for inner in reversed(folders))
    return found


def read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    """An image as `image_folder` reads it. **Raises** `DataError` where it is missing, broken, or too small."""
    try:
        with Image.open(path) as file:
            _check_side(path, file, size)  # before it is decoded
            image = _flatten(file).convert("L" if channels == 1 else "RGB")
    except DataError:
        raise
    except Exception as error:  # on broken files, Pillow's decoders raise nearly anything
        raise DataError(f"{path}: not a usable image ({error}); replace or remove it") from error
    if min(image.size) > size:
        width, height = (round(side * size / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def _check_side(path: Path, image: Image.Image, size: int) -> None:
    if min(image.size) < size:
        have = f"{image.width}x{image.height} pixels"
        raise DataError(f"{path}: {have}, smaller than {size}x{size}; remove it, or enlarge it first")


def _flatten(image: Image.Image) -> Image.Image:
    """One opaque frame of 8 bits."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO is how cameras add a preview to a JPEG
        raise InputValueError(f"an animation or stack of {frames} frames")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # which older Pillows say
        # Pillow's own conversion would clip at 255.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputValueError("32-bit pixels, whose range is unknown")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image
