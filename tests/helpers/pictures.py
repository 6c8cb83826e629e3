"""Pictures, pixel by pixel, and their texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from torch import Tensor

WHITE, CAPTION, GAP = 255, 40, 4


def random_images(num: int, channels: int = 1, height: int = 3, width: int = 56) -> Tensor:
    levels = torch.randint(256, (num, channels, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def assert_placed(sheet: NDArray[np.uint8], images: Tensor, columns: int, zoom: int) -> None:
    """The sheet is exactly the images in rows of `columns`, with white between and around them."""
    levels = np.clip(np.rint((images.double().numpy() + 1) * 127.5), 0, 255).transpose(0, 2, 3, 1)
    height, width = (zoom * size + GAP for size in levels.shape[1:3])
    rows = -(-len(images) // columns)
    want = np.full((rows * height + GAP, columns * width + GAP, 3), WHITE, np.uint8)
    for i, image in enumerate(levels):
        top, left = GAP + i // columns * height, GAP + i % columns * width
        want[top : top + height - GAP, left : left + width - GAP] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    assert np.array_equal(sheet[:, : want.shape[1]], want)
    assert (sheet[:, want.shape[1] :] == WHITE).all()


def texts_fit(figure: Figure, texts: Sequence[Text]) -> bool:
    """Tells if no text leaves the figure or overlaps another."""
    boxes = [Text.get_window_extent(text) for text in texts if text.get_text() and text.get_visible()]
    inside = all(0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1 for box in boxes)
    return inside and not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
