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
from jacobiflow.utils.files import regular_file

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

    def has_other_sides(self) -> bool:
        """Tells whether an image is scaled or cropped."""
        return any(image_sides(file) != (self.size, self.size) for file in self.files)

    def __getitem__(self, index: Any) -> UInt8[Tensor, "*n c h w"]:
        if isinstance(index, int):
            return read_image(self.files[index], self.size, self.channels)
        return torch.stack([self[i] for i in torch.arange(len(self))[index].tolist()])


def image_sides(path: Path) -> tuple[int, int]:
    """Returns the width and the height of an image, without reading its pixels."""
    with _opened(path) as file:
        return file.size


def is_grey(path: Path) -> bool:
    """Tells whether all pixels of an image are grey."""
    with _opened(path) as file:
        if file.mode in ("1", "L", "LA") or file.mode.startswith("I"):
            return True
        red, green, blue = np.asarray(_to_opaque(file).convert("RGB")).transpose(2, 0, 1)
    return bool((red == green).all() and (green == blue).all())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image; raises DataError in place of the many kinds of exceptions that Pillow raises for broken files."""
    from PIL import Image

    try:
        with Image.open(regular_file(path)) as file:
            yield file
    except Exception as error:
        raise DataError(f"{path}: not a usable image ({error}); replace or remove it") from error


def read_image(path: Path, size: int, channels: int) -> UInt8[Tensor, "c h w"]:
    """Reads an image, and resizes its shorter side to `size` and crops the centre.

    Raises:
        DataError: If the file is broken, animated, of 32-bit pixels or smaller than `size`.
    """
    from PIL import Image

    with _opened(path) as file:
        image = _to_opaque(file).convert("L" if channels == 1 else "RGB")
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


def _to_opaque(image: Image.Image) -> Image.Image:
    """Returns an image of 8 bits without transparency; raises ValueError for animations and 32-bit pixels."""
    from PIL import Image

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # Cameras store a preview as a second frame of MPO.
        raise ValueError(f"an animation or stack of {frames} frames")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would clip 16-bit greys at 255. Older versions of Pillow read them in mode "I".
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image
