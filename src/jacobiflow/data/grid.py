"""Images side by side, as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from jacobiflow.data.dataset import quantize

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 4  # pixels
_IMAGE = 112  # pixels that an image is drawn wide, or the nearest whole multiple of its own


def image_grid(images: Float[Tensor, "n c h w"], columns: int, zoom: int | None = None, gap: int = _GAP) -> Image:
    """Draws images, nominally in [-1, 1], in rows of `columns`, each pixel `zoom` wide. NaN is black.

    Example:
        >>> from jacobiflow.data import image_grid
        >>> image_grid(torch.zeros(3, 1, 28, 28), columns=3).size
        (352, 120)
    """
    from PIL.Image import fromarray

    zoom = zoom or max(1, round(_IMAGE / images.shape[-1]))
    pixels = quantize(images).permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1] * zoom + gap, pixels.shape[2] * zoom + gap
    sheet = np.full((rows * height + gap, columns * width + gap, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height + gap, i % columns * width + gap
        enlarged = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        sheet[top : top + len(enlarged), left : left + enlarged.shape[1]] = enlarged
    return fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).convert("RGB")
