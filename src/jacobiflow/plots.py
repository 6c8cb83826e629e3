"""Pictures of samples."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.files import write_atomically


def image_grid(images: Float[Tensor, "n c h w"], columns: int, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Images, nominally in [-1, 1], in rows of `columns`, each pixel drawn `zoom` wide; a NaN is drawn black."""
    pixels = quantize(images.nan_to_num(nan=-1.0)).permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1] * zoom, pixels.shape[2] * zoom
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (gap + i // columns * (height + gap)), (gap + i % columns * (width + gap))
        sheet[top : top + height, left : left + width] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).convert("RGB")


def comparison_sheet(
    reference: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], names: tuple[str, str], zoom: int = 2
) -> Image.Image:
    """Three panels: `reference`, `images`, and their difference, its largest entry drawn white.

    `names` are the captions of the first two; the third's gives the largest difference. Rows hold at most 20 images.
    """
    difference = (images - reference).abs()
    largest = float(difference.nan_to_num().max())
    shown = difference / max(largest, 1e-30) * 2 - 1
    captions = (*names, f"difference; white is {largest:.1e}")
    grids = [image_grid(panel, min(len(panel), 20), zoom) for panel in (reference, images, shown)]
    font = ImageFont.load_default(size=14)
    caption_height = 22
    width = max(grids[0].width, *(int(font.getlength(caption)) + 8 for caption in captions))
    sheet = Image.new("RGB", (width, sum(grid.height + caption_height for grid in grids)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for grid, caption in zip(grids, captions, strict=True):
        draw.text((4, top + 3), caption, fill="black", font=font)
        sheet.paste(grid, (0, top + caption_height))
        top += grid.height + caption_height
    return sheet


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG; the file appears whole or not at all."""
    data = io.BytesIO()
    image.save(data, "PNG")
    write_atomically(path, data.getvalue())
