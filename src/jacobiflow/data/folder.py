"""Folders of image files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jacobiflow.data.dataset import DataError, ImageDataset

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".tif", ".tiff"})


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
    # One image is read before memory is taken for all: it refuses a size that is far too large.
    images = torch.empty(len(files), *_read_image(files[0], size, channels).shape, dtype=torch.uint8)
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
    """All image files below `folder`: its own, then those of its subfolders, each in order of name."""
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        folders, files = _list_folder(waiting.pop())
        found += files
        waiting += reversed(folders)
    return found


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
