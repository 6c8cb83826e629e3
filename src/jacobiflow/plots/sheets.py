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
from jacobiflow.plots.style import TEXT_COLOR

_CAPTION_HEIGHT, _LETTER_HEIGHT = 40, 28  # pixels; readable if a phone shows a sheet of 10 images
_COLUMNS = 10  # images on a line
_ENLARGED_WIDTH = 336  # pixels of an enlarged image, three times those of the others


def comparison_sheet(
    reference: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], names: tuple[str, str],
    columns: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Draws `reference` and `images`, and enlarges the sample that differs most (cf. Figure 7 of the paper).

    Beside the enlarged sample is its difference, the largest of all channels. It is multiplied until its largest value
    is black. It is left out if no pixel differs by half a grey level.

    Args:
        reference: Images of the first row.
        images: Images of the second row.
        names: Captions of these two rows.
        columns: Names of the images in a row; see `rows_sheet`.
    """
    reference, images = (each.clamp(-1, 1).nan_to_num(-1.0) for each in (reference, images))  # NaN is drawn black
    difference = (images - reference).abs().amax(1, keepdim=True) / 2  # 1 is the range from black to white.
    worst = int(difference.flatten(1).amax(1).argmax())
    levels = 255 * float(difference[worst].max())
    enlarged, captions = [reference[worst], images[worst]], [*names]
    caption = f"sample {worst} differs most, by {levels:.2g} of 255 grey levels:"
    if levels >= 0.5:
        enlarged.append((1 - 2 * 255 / levels * difference[worst]).expand_as(images[worst]))
        captions.append(f"difference x {255 / levels:,.0f}")
    grid = image_grid(torch.stack(enlarged), len(enlarged), zoom=max(1, round(_ENLARGED_WIDTH / images.shape[-1])))
    parts = [rows_sheet(list(zip(names, (reference, images), strict=True)), columns), _caption(caption)]
    return stack_images([*parts, column_captions(captions, grid.width), grid])


def rows_sheet(rows: Sequence[tuple[str, Float[Tensor, "n c h w"]]], columns: Sequence[str] = ()) -> Image.Image:
    """Draws rows of images, each below its caption, at most 10 images on a line (Figure 4 of the paper).

    Args:
        rows: Captions and images.
        columns: Names of the images in a row. They are written above all rows if they are the same on every line.
    """
    grids = [image_grid(images, min(len(images), _COLUMNS)) for _, images in rows]
    parts = []
    if columns and all(name == columns[i % _COLUMNS] for i, name in enumerate(columns)):
        parts.append(column_captions(columns[:_COLUMNS], max(grid.width for grid in grids)))
    for (caption, _), grid in zip(rows, grids, strict=True):
        parts += [_caption(caption), grid]
    return stack_images(parts)


def stack_images(parts: Sequence[Image.Image]) -> Image.Image:
    """Places images one below the other, on white."""
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _caption(text: str) -> Image.Image:
    strip = Image.new("RGB", (int(_font(_LETTER_HEIGHT).getlength(text)) + 12, _CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((4, _CAPTION_HEIGHT / 2), text, fill=TEXT_COLOR, font=_font(_LETTER_HEIGHT), anchor="lm")
    return strip


def column_captions(names: Sequence[str], width: int) -> Image.Image:
    """Draws each name in the middle of its column, in letters that fit."""
    strip = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
    draw, step = ImageDraw.Draw(strip), width / len(names)
    longest = max(_font(_LETTER_HEIGHT).getlength(name) for name in names)
    letters = _font(max(int(_LETTER_HEIGHT * min(1.0, (step - 4) / max(longest, 1.0))), 6))
    for column, name in enumerate(names):
        draw.text(((column + 0.5) * step, _CAPTION_HEIGHT / 2), name, fill=TEXT_COLOR, font=letters, anchor="mm")
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the font of matplotlib's figures; `size` in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
