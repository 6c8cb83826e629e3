"""Sheets of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.plots.style import INK, font

_CAPTION, _LETTERS = 32, 20  # pixels: 14 of the latter where a page shows a sheet of 10 images 830 pixels wide
_COLUMNS = 10
_IMAGE = 112  # pixels that an image is drawn wide, or the nearest whole multiple of its own


def image_grid(images: Float[Tensor, "n c h w"], columns: int, zoom: int | None = None, gap: int = 4) -> Image.Image:
    """Draws images, nominally in [-1, 1], in rows of `columns`, NaN black.

    Each pixel is `zoom` wide; by default 4 for images of 28 pixels, 1 for those of more than 75.

    Example:
        >>> from jacobiflow.plots import image_grid
        >>> image_grid(torch.zeros(3, 1, 28, 28), columns=3).size
        (352, 120)
    """
    zoom = zoom or max(1, round(_IMAGE / images.shape[-1]))
    pixels = quantize(images.nan_to_num(nan=-1.0)).permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1] * zoom, pixels.shape[2] * zoom
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (gap + i // columns * (height + gap)), (gap + i % columns * (width + gap))
        sheet[top : top + height, left : left + width] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).convert("RGB")


def comparison_sheet(
    reference: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], names: tuple[str, str],
    zoom: int | None = None, columns: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Draws three panels: `reference`, `images`, and their difference (Figure 7 of the paper).

    `names` are the captions of the first two; the third one names the largest difference, which is white. See
    `image_grid` for `zoom`, `rows_sheet` for `columns`.
    """
    difference = (images - reference).abs()
    largest = float(difference.nan_to_num().max())
    stretched = difference / max(largest, 1e-30) * 2 - 1
    captions = (*names, f"difference; white is {largest:.1e}")
    return rows_sheet(list(zip(captions, (reference, images, stretched), strict=True)), zoom, columns)


def rows_sheet(
    rows: Sequence[tuple[str, Float[Tensor, "n c h w"]]], zoom: int | None = None, columns: Sequence[str] = ()
) -> Image.Image:
    """Draws rows of images, each below its caption, at most 10 images a line (Figure 4 of the paper).

    `columns` are names of the images of a row, written once above all rows; they are left out if they differ from line
    to line. See `image_grid` for `zoom`.
    """
    grids = [image_grid(images, min(len(images), _COLUMNS), zoom) for _, images in rows]
    width = max(*(grid.width for grid in grids), *(int(font(_LETTERS).getlength(caption)) + 12 for caption, _ in rows))
    header = _header(columns, max(len(images) for _, images in rows), max(grid.width for grid in grids))
    top = 0 if header is None else _CAPTION
    sheet = Image.new("RGB", (width, top + sum(grid.height + _CAPTION for grid in grids)), "white")
    if header is not None:
        sheet.paste(header, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for grid, (caption, _) in zip(grids, rows, strict=True):
        draw.text((4, top + _CAPTION / 2), caption, fill=INK, font=font(_LETTERS), anchor="lm")
        sheet.paste(grid, (0, top + _CAPTION))
        top += grid.height + _CAPTION
    return sheet


def trace_sheet(trace: Sequence[Float[Tensor, "n c h w"]], denoised: bool, zoom: int | None = None) -> Image.Image:
    """Draws `Samples.trace`: noise, then the image after each block in sampling order (Figure 3 of the paper).

    A line is a sample. `denoised` tells if the last image is denoised; see `image_grid` for `zoom`.
    """
    blocks = len(trace) - 1 - denoised
    captions = ["noise", *(f"block {i}" for i in reversed(range(blocks))), *["denoised"] * denoised]
    grid = image_grid(torch.stack(list(trace), dim=1).flatten(0, 1), len(trace), zoom)
    sheet = Image.new("RGB", (grid.width, grid.height + _CAPTION), "white")
    sheet.paste(grid, (0, _CAPTION))
    sheet.paste(_names(captions, grid.width), (0, 0))
    return sheet


def _header(columns: Sequence[str], count: int, width: int) -> Image.Image | None:
    """The names of `count` images above the lines that they fill; None if lines differ in them."""
    lines = [list(columns[first : first + _COLUMNS]) for first in range(0, min(count, len(columns)), _COLUMNS)]
    if not lines or any(line != lines[0][: len(line)] for line in lines):
        return None
    return _names(lines[0], width)


def _names(names: Sequence[str], width: int) -> Image.Image:
    """Names, each in the middle of its column, in letters that fit."""
    strip = Image.new("RGB", (width, _CAPTION), "white")
    draw, step = ImageDraw.Draw(strip), width / len(names)
    longest = max(font(_LETTERS).getlength(name) for name in names)
    letters = font(max(int(_LETTERS * min(1.0, (step - 4) / max(longest, 1.0))), 6))
    for column, name in enumerate(names):
        draw.text(((column + 0.5) * step, _CAPTION / 2), name, fill=INK, font=letters, anchor="mm")
    return strip
