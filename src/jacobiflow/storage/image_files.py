"""The bytes of 8-bit images as .npz and .png files: the same bytes for the same pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image


def to_npz(pixels: UInt8[ndarray, "n h w c"], labels: Sequence[int] | None) -> bytes:
    """An .npz file of `arr_0` and, where there are any, `labels`; neither compressed nor dated."""
    data = io.BytesIO()
    arrays: dict[str, Any] = {"arr_0": pixels}
    if labels is not None:
        arrays["labels"] = np.array(labels, np.int64)
    np.savez(data, **arrays)
    return data.getvalue()


def from_npz(path: Path) -> UInt8[ndarray, "n h w c"]:
    """The images in a file that `to_npz` made."""
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays["arr_0"])


def to_png(pixels: UInt8[ndarray, "h w c"]) -> bytes:
    """A PNG file of one image of 1 or 3 channels."""
    data = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(data, "png")
    return data.getvalue()


def from_png(path: Path) -> UInt8[ndarray, "h w c"]:
    """The image in a file that `to_png` made."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
