"""Sheets of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jacobiflow.data import image_grid
from jacobiflow.plots.style import INK

_CAPTION, _LETTERS = 40, 28  # pixels: 9 of the latter where a phone shows a sheet of 10 images
_COLUMNS = 10
_LEVEL = 2 / 255  # one level of an 8-bit image, whose entries are in [-1, 1]


def comparison_sheet(
    reference: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], names: tuple[str, str],
    columns: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Draws `reference`, `images` and their difference (Figure 7 of the paper).

    The largest difference is black. If it is below one level of an 8-bit image, as rounding is, all are white.
    `names` are the captions of the first two; for `columns` see `rows_sheet`.
    """
    difference = (images - reference).abs().masked_fill(images.isnan() & reference.isnan(), 0)
    largest = float(difference.nan_to_num().max())
    stretched = 1 - difference / largest * 2 if largest > _LEVEL else torch.ones_like(difference)
    scale = "black is" if largest > _LEVEL else "at most"
    captions = (*names, f"difference; {scale} {largest:.1e}")
    return rows_sheet(list(zip(captions, (reference, images, stretched), strict=True)), columns)


def rows_sheet(rows: Sequence[tuple[str, Float[Tensor, "n c h w"]]], columns: Sequence[str] = ()) -> Image.Image:
    """Draws rows of images, each below its caption, at most 10 images a line (Figure 4 of the paper).

    `columns` are names of the images of a row, written once above all rows if they are the same on every line.
    """
    grids = [image_grid(images, min(len(images), _COLUMNS)) for _, images in rows]
    parts = []
    if columns and all(name == columns[i % _COLUMNS] for i, name in enumerate(columns)):
        parts.append(column_names(columns[:_COLUMNS], max(grid.width for grid in grids)))
    for (caption, _), grid in zip(rows, grids, strict=True):
        parts += [_caption(caption), grid]
    return stacked(parts)


def stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Returns images one below the other, on white."""
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _caption(text: str) -> Image.Image:
    strip = Image.new("RGB", (int(_font(_LETTERS).getlength(text)) + 12, _CAPTION), "white")
    ImageDraw.Draw(strip).text((4, _CAPTION / 2), text, fill=INK, font=_font(_LETTERS), anchor="lm")
    return strip


def column_names(names: Sequence[str], width: int) -> Image.Image:
    """Returns a strip with each name in the middle of its column, in letters that fit."""
    strip = Image.new("RGB", (width, _CAPTION), "white")
    draw, step = ImageDraw.Draw(strip), width / len(names)
    longest = max(_font(_LETTERS).getlength(name) for name in names)
    letters = _font(max(int(_LETTERS * min(1.0, (step - 4) / max(longest, 1.0))), 6))
    for column, name in enumerate(names):
        draw.text(((column + 0.5) * step, _CAPTION / 2), name, fill=INK, font=letters, anchor="mm")
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of matplotlib's figures; `size` in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
