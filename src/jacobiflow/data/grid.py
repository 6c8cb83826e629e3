"""A picture of many images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from jacobiflow.data.dataset import quantize

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_CHANNELS = (1, 3)  # Of grey and colour images; latents of an autoencoder have others.
_GAP = 4  # Pixels between images.
_WIDTH = 112  # Pixels of an image in the picture; the nearest multiple of its own width is taken.


def image_grid(images: Float[Tensor, "n c h w"], columns: int, zoom: int | None = None) -> Image:
    """Draws images in rows of `columns`. Values are in [-1, 1]; NaN is black.

    Args:
        zoom: Side in pixels at which a pixel of an image is drawn; by default images are about 112 pixels wide.

    Example:
        >>> from jacobiflow.data import image_grid
        >>> image_grid(torch.zeros(3, 1, 28, 28), columns=3).size
        (352, 120)
    """
    from PIL import Image

    zoom = zoom or max(1, round(_WIDTH / images.shape[-1]))
    levels = quantize(images).permute(0, 2, 3, 1).cpu().numpy()
    height, width = levels.shape[1] * zoom, levels.shape[2] * zoom
    rows = -(-len(levels) // columns)
    grid = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    for i, image in enumerate(levels):
        corner = (i % columns * (width + _GAP) + _GAP, i // columns * (height + _GAP) + _GAP)
        pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        grid.paste(pixels.resize((width, height), Image.Resampling.NEAREST), corner)
    return grid
