"""A picture of many images, with their names."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from jacobiflow.data.dataset import quantize

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

PICTURE_CHANNELS = (1, 3)  # Of grey and colour images; latents of an autoencoder have others.
CAPTION_HEIGHT, _LETTER_HEIGHT = 40, 28  # Pixels; readable if a phone shows a picture of 10 images a line.
TEXT_COLOR = "#222222"
_GAP = 4  # Pixels between images.
_LETTER_WIDTH, _NAME_LINES = 11, 3  # Pixels for each letter of a line, beyond which a name is wrapped, and its lines.
_LINE_WIDTH, _MIN_WIDTH, _MAX_WIDTH = 1120, 112, 336  # Pixels of a line, and of an image in it.


def image_grid(
    images: Float[Tensor, "n c h w"], columns: int, zoom: int | None = None, names: Sequence[str] = ()
) -> Image:
    """Draws images in rows of `columns`. Values are in [-1, 1]; NaN is black.

    Args:
        zoom: Side in pixels at which a pixel of an image is drawn; by default images are 112 to 336 pixels wide.
        names: Names of the images, written above each line, or once if all lines have the same; need matplotlib. Long
            names are wrapped, and cut after three lines.

    Example:
        >>> from jacobiflow.data import image_grid
        >>> image_grid(torch.zeros(30, 1, 28, 28), columns=10).size
        (1164, 352)
    """
    from PIL import Image, ImageDraw

    zoom = zoom or max(1, round(min(max(_LINE_WIDTH // columns, _MIN_WIDTH), _MAX_WIDTH) / images.shape[-1]))
    levels = quantize(images).permute(0, 2, 3, 1).cpu().numpy()
    height, width = levels.shape[1] * zoom + _GAP, levels.shape[2] * zoom + _GAP
    rows, lines = (-(-len(each) // columns) for each in (levels, names))
    if all(name == names[i % columns] for i, name in enumerate(names)):
        lines = min(lines, 1)
    font, name_height = None, 0
    if names:
        letters = max(width // _LETTER_WIDTH, 8)
        names = [textwrap.fill(name, letters, max_lines=_NAME_LINES, placeholder="...") for name in names]
        font = fitting_font(names, width - 8)
        name_height = CAPTION_HEIGHT + max(name.count("\n") for name in names) * int(1.3 * font.size)
    grid = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP + lines * name_height), "white")
    for i, name in enumerate(names[: lines * columns]):
        row, column = divmod(i, columns)
        middle = (column * width + (width + _GAP) / 2, row * (height + name_height) + name_height / 2)
        ImageDraw.Draw(grid).text(middle, name, fill=TEXT_COLOR, font=font, anchor="mm", align="center")
    for i, image in enumerate(levels):
        row, column = divmod(i, columns)
        corner = (column * width + _GAP, row * height + _GAP + min(row + 1, lines) * name_height)
        pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        grid.paste(pixels.resize((width - _GAP, height - _GAP), Image.Resampling.NEAREST), corner)
    return grid


def fitting_font(names: Sequence[str], width: float = float("inf")) -> FreeTypeFont:
    """Returns the font of matplotlib's figures, in a size at which the longest name fits into `width` pixels."""
    import matplotlib
    from PIL import ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _LETTER_HEIGHT)
    longest = max(font.getlength(line) for name in names for line in name.split("\n"))
    return font.font_variant(size=max(int(_LETTER_HEIGHT * min(1.0, (width - 4) / max(longest, 1.0))), 6))
