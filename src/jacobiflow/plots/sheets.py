"""Sheets of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jacobiflow.data import quantize

_CAPTION = 22  # pixels
_COLUMNS = 20


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
    """Three panels: `reference`, `images`, and their difference, its largest entry drawn white (Figure 7 of the paper).

    `names` are the captions of the first two; the third's gives the largest difference. A line has at most 20 images.
    """
    difference = (images - reference).abs()
    largest = float(difference.nan_to_num().max())
    shown = difference / max(largest, 1e-30) * 2 - 1
    captions = (*names, f"difference; white is {largest:.1e}")
    return rows_sheet(list(zip(captions, (reference, images, shown), strict=True)), zoom)


def rows_sheet(rows: Sequence[tuple[str, Float[Tensor, "n c h w"]]], zoom: int = 2) -> Image.Image:
    """Rows of images under each other, each below its caption (Figure 4 of the paper); at most 20 images a line."""
    grids = [image_grid(images, min(len(images), _COLUMNS), zoom) for _, images in rows]
    font = ImageFont.load_default(size=14)
    width = max(*(grid.width for grid in grids), *(int(font.getlength(caption)) + 8 for caption, _ in rows))
    sheet = Image.new("RGB", (width, sum(grid.height + _CAPTION for grid in grids)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for grid, (caption, _) in zip(grids, rows, strict=True):
        draw.text((4, top + 3), caption, fill="black", font=font)
        sheet.paste(grid, (0, top + _CAPTION))
        top += grid.height + _CAPTION
    return sheet


def trace_sheet(trace: Sequence[Float[Tensor, "n c h w"]], denoised: bool, zoom: int = 2) -> Image.Image:
    """A sample a line: noise, the image after each block in sampling order, and `denoised` (Figure 3 of the paper).

    `trace` is `Samples.trace`.
    """
    blocks = len(trace) - 1 - denoised
    captions = ["noise", *(f"block {i}" for i in reversed(range(blocks))), *["denoised"] * denoised]
    grid = image_grid(torch.stack(list(trace), dim=1).flatten(0, 1), len(trace), zoom)
    sheet = Image.new("RGB", (grid.width, grid.height + _CAPTION), "white")
    sheet.paste(grid, (0, _CAPTION))
    draw, step = ImageDraw.Draw(sheet), grid.width / len(trace)
    font = ImageFont.load_default(size=min(14, step / 5.5))
    for column, caption in enumerate(captions):
        draw.text(((column + 0.5) * step, _CAPTION / 2), caption, fill="black", font=font, anchor="mm")
    return sheet
