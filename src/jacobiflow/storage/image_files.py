"""The bytes of 8-bit images as .npz and .png files: the same bytes for the same pixels."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from jacobiflow.errors import InputValueError


def to_npz(pixels: UInt8[ndarray, "n h w c"], labels: Sequence[int] | None) -> bytes:
    """An .npz file of `arr_0` and, where there are any, `labels`; neither compressed nor dated."""
    data = io.BytesIO()
    arrays: dict[str, Any] = {"arr_0": pixels}
    if labels is not None:
        arrays["labels"] = np.array(labels, np.int64)
    np.savez(data, **arrays)
    return data.getvalue()


def from_npz(path: Path, shape: tuple[int, int, int, int]) -> UInt8[ndarray, "n h w c"]:
    """The images in a file that `to_npz` made. **Raises** `ValueError` as `check_npz` does."""
    check_npz(path, shape)
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays["arr_0"])


def check_npz(path: Path, shape: tuple[int, int, int, int]) -> None:
    """**Raises** `ValueError` where a file holds no 8-bit images of that shape, by its header: no array is made."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)  # of version 1.0, as its header is short
            have, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputValueError("holds no images") from error
    if have != shape or dtype != np.uint8:
        raise InputValueError(f"holds {dtype} of shape {have}, not uint8 of shape {shape}")


def to_png(pixels: UInt8[ndarray, "h w c"]) -> bytes:
    """A PNG file of one image of 1 or 3 channels."""
    data = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(data, "png")
    return data.getvalue()


def from_png(path: Path, shape: tuple[int, int, int]) -> UInt8[ndarray, "h w c"]:
    """The image in a file that `to_png` made. **Raises** `ValueError` as `check_png` does."""
    check_png(path, shape)
    with Image.open(path) as image:
        return np.asarray(image).reshape(shape)


def check_png(path: Path, shape: tuple[int, int, int]) -> None:
    """**Raises** `ValueError` where a file holds no 8-bit image of that shape, by its header: no pixels are read."""
    height, width, channels = shape
    try:
        with Image.open(path) as image:
            have, want = (*image.size, image.mode), (width, height, "L" if channels == 1 else "RGB")
    except (ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputValueError("holds no image") from error
    if have != want:
        raise InputValueError(f"holds an image {have[0]}x{have[1]} {have[2]}, not {width}x{height} {want[2]}")
