"""Sheets of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.data.grid import CAPTION_HEIGHT, TEXT_COLOR, fitting_font, image_grid

_COLUMNS = 10  # images on a line


def comparison_sheet(
    reference: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], names: tuple[str, str],
    columns: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Draws `reference` and `images`, and enlarges the sample that differs most (cf. Figure 7 of the paper).

    Beside the enlarged sample is its difference, the largest of all channels. It is multiplied until its largest value
    is black. Nothing is enlarged if no pixel differs by half a grey level.

    Args:
        reference: Images of the first row.
        images: Images of the second row.
        names: Captions of these two rows.
        columns: Names of the images in a row.
    """
    reference, images = (each.clamp(-1, 1).nan_to_num(-1.0) for each in (reference, images))  # NaN is drawn black
    sheet = rows_sheet(list(zip(names, (reference, images), strict=True)), columns)
    difference = (images - reference).abs().amax(1, keepdim=True) / 2  # 1 is the range from black to white.
    worst = int(difference.flatten(1).amax(1).argmax())
    levels = 255 * float(difference[worst].max())
    if torch.equal(quantize(reference), quantize(images)):
        return stack_images([sheet, _caption("identical to the last grey level")])
    if levels < 0.5:
        return stack_images([sheet, _caption(f"no pixel differs by more than {levels:.2g} of 255 grey levels")])
    enlarged = [reference[worst], images[worst], (1 - 2 * 255 / levels * difference[worst]).expand_as(images[worst])]
    captions = [*names, f"difference x {255 / levels:,.0f}"]
    caption = f"sample {worst} differs most, by {levels:.2g} of 255 grey levels:"
    return stack_images([sheet, _caption(caption), image_grid(torch.stack(enlarged), len(enlarged), names=captions)])


def rows_sheet(rows: Sequence[tuple[str, Float[Tensor, "n c h w"]]], columns: Sequence[str] = ()) -> Image.Image:
    """Draws rows of images, each below its caption, at most 10 images on a line (Figure 4 of the paper).

    Args:
        rows: Captions and images.
        columns: Names of the images in the longest row. Names that all lines share are written once.
    """
    columns_in_line = min(max(len(images) for _, images in rows), _COLUMNS)
    are_shared = all(name == columns[i % _COLUMNS] for i, name in enumerate(columns))
    parts: list[Image.Image] = []
    for caption, images in rows:
        names = () if parts and are_shared else columns[: len(images)]
        parts += [_caption(caption), image_grid(images, columns_in_line, names=names)]
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
    font = fitting_font([text])
    strip = Image.new("RGB", (int(font.getlength(text)) + 12, CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((4, CAPTION_HEIGHT / 2), text, fill=TEXT_COLOR, font=font, anchor="lm")
    return strip
