"""Arrays and images as the bytes of files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from jacobiflow.errors import InputValueError


def to_numpy(x: Tensor) -> np.ndarray:
    """Returns a tensor as an array; bfloat16, which NumPy does not have, as float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def npz_bytes(arrays: Mapping[str, Tensor | None]) -> bytes:
    """Returns the arrays as the bytes of an .npz file, which holds no date; those that are `None` are left out."""
    stored: dict[str, Any] = {name: to_numpy(each) for name, each in arrays.items() if each is not None}
    npz = io.BytesIO()
    np.savez(npz, **stored)
    return npz.getvalue()


def png_bytes(pixels: UInt8[Tensor, "h w c"]) -> bytes:
    """Returns a grey or colour image as the bytes of a PNG file."""
    png = io.BytesIO()
    pillow().fromarray((pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).cpu().numpy()).save(png, "png")
    return png.getvalue()


def pillow() -> Any:
    """Returns `PIL.Image`. Raises ValueError if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputValueError("PNG files need Pillow: pip install pillow") from error
    return Image
