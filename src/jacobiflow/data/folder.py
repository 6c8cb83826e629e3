"""Folders of image files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from jacobiflow.checks import check_choice, check_count
from jacobiflow.data.dataset import DataError, ImageDataset

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".tif", ".tiff"})


def image_folder(folder: str | Path, size: int, channels: int = 3) -> ImageDataset:
    """Reads every image below a folder, with one class per subfolder.

    The shorter side is resized to `size` and the centre cropped. Transparent pixels are blended onto white, 16-bit
    greys are rounded to 8 bits, and an orientation in EXIF is ignored. Links are followed. Hidden files, and files
    without an image's suffix, are skipped. Images are in the order of their names, and so are classes.

    Args:
        folder: Images, or subfolders with images. Images directly in `folder` have no labels.
        size: Side of the images in pixels.
        channels: 3, or 1 for grey.

    Raises:
        DataError: If there is no image, a class has none, images lie beside class folders, an image is broken,
            animated, of 32-bit pixels or smaller than `size`, or the images do not fit in memory.
    """
    root = Path(folder)
    size, channels = check_count("size", size), check_choice("channels", channels, (1, 3))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    direct = sorted(path for path in root.iterdir() if _is_image(path.name))
    subfolders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    members = {path.name: _images_below(path) for path in subfolders}
    empty = [name for name, files in members.items() if not files]
    if direct and len(empty) < len(members):
        raise DataError(f"{root}: {direct[0].name} lies beside class folders; move it into one")
    if not direct and len(empty) == len(members):
        raise DataError(f"{root}: no image in it (looked for {', '.join(sorted(_SUFFIXES))})")
    if not direct and empty:
        raise DataError(f"{root / empty[0]}: class folder without an image; add some, or remove it")
    files = direct or [file for files in members.values() for file in files]
    read_image(files[0], size, channels)  # a size that is far too large is refused here, not for want of memory
    needed, have = len(files) * channels * size * size, _memory()
    if have is not None and needed > have:
        raise DataError(
            f"{root}: {len(files):,} images of {channels}x{size}x{size} need {needed / 2**30:,.1f} GiB of memory, and "
            f"this machine has {have / 2**30:,.1f} GiB; give fewer"
        )
    images = torch.stack([read_image(file, size, channels) for file in files])
    if direct:
        return ImageDataset(images, None)
    labels = [label for label, files in enumerate(members.values()) for _ in files]
    return ImageDataset(images, torch.tensor(labels), tuple(members))


def _memory() -> int | None:
    """The bytes of memory of this machine; `None` if not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES


def _images_below(folder: Path) -> list[Path]:
    """Returns all image files below `folder`, in the order of their names."""

    def fail(error: OSError) -> NoReturn:
        raise error

    files = []
    for place, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if _is_image(name)]
    return files


def read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    """Reads an image as `image_folder` does."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = _flatten(file).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # on broken files, Pillow's decoders raise nearly anything
        raise DataError(f"{path}: not a usable image ({error}); replace or remove it") from error
    shorter = min(image.size)
    if shorter < size:
        have = f"{image.width}x{image.height} pixels"
        raise DataError(f"{path}: {have}, smaller than {size}x{size}; remove it, or enlarge it first")
    width, height = (round(side * size / shorter) for side in image.size)
    if shorter > size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def _flatten(image: Image.Image) -> Image.Image:
    """One opaque frame of 8 bits."""
    from PIL import Image

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO is how cameras add a preview to a JPEG
        raise ValueError(f"an animation or stack of {frames} frames")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # the mode of older Pillows
        # Pillow's own conversion would clip at 255.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image
