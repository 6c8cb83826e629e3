"""Images in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from jacobiflow.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageFiles:
    """Images that are read from files whenever they are indexed, like a tensor uint8 (N, C, H, W).

    Args:
        files: A file for each image.
        size: Side of the images in pixels, see `read_image`.
        channels: 3 for colour, 1 for grey.
    """

    files: tuple[Path, ...]
    size: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all images together."""
        return len(self.files), self.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> UInt8[Tensor, "*n c h w"]:
        if isinstance(index, int):
            return read_image(self.files[index], self.size, self.channels)
        return torch.stack([self[i] for i in torch.arange(len(self), device="cpu")[index].tolist()])


def natural_shape(files: tuple[Path, ...]) -> tuple[int, int]:
    """Returns the smallest side of images in files, and 1 channel if all files are grey, or else 3."""
    size, channels = [], 1
    for path in files:
        with _open_image(path) as image:  # Pixels are not read.
            size.append(min(image.size))
            channels = channels if image.mode in ("1", "L", "LA") else 3
    return min(size), channels


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Opens an image; raises DataError in place of the many kinds of exceptions that Pillow raises for broken files."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:
        raise DataError(f"{path}: not a usable image ({error}); replace it, or remove it before training") from error


def read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    """Reads an image, turns it upright as its EXIF data say, resizes its shorter side to `size` and crops the centre.

    Transparent pixels are blended onto white.

    Raises:
        DataError: If the file is broken, has more than 8 bits per value, or is smaller than `size`.
    """
    from PIL import Image, ImageOps

    with _open_image(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per value")
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
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
