"""Pictures: every pixel where it belongs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jacobiflow.plots import comparison_sheet, image_grid, save_png

WHITE, CAPTION = 255, 22


def random_images(num: int, channels: int = 1, height: int = 3, width: int = 4) -> Tensor:
    levels = torch.randint(256, (num, channels, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def bytes_of(images: Tensor) -> NDArray[np.uint8]:
    """8-bit pixels (N, H, W, 3), by a formula of its own."""
    levels = np.clip(np.rint((images.double().numpy() + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.broadcast_to(levels.transpose(0, 2, 3, 1), (*levels.shape[:1], *levels.shape[2:], 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("columns", "zoom", "gap"), [(3, 2, 2), (5, 1, 0), (7, 3, 1), (1, 1, 4)])
def test_a_grid_places_every_pixel(channels: int, columns: int, zoom: int, gap: int) -> None:
    images = random_images(5, channels)
    sheet = image_grid(images, columns, zoom, gap)
    assert sheet.mode == "RGB"
    rows = -(-5 // columns)
    want = np.full((rows * (3 * zoom + gap) + gap, columns * (4 * zoom + gap) + gap, 3), WHITE, np.uint8)
    for i, image in enumerate(bytes_of(images)):
        row, column = divmod(i, columns)
        for y in range(3 * zoom):
            for x in range(4 * zoom):
                top, left = gap + row * (3 * zoom + gap), gap + column * (4 * zoom + gap)
                want[top + y, left + x] = image[y // zoom, x // zoom]
    assert np.array_equal(np.asarray(sheet), want)


def test_values_are_clipped_and_a_nan_is_black() -> None:
    images = torch.tensor([-torch.inf, -1.5, -1, 0, 1, 1.5, torch.inf, torch.nan]).view(1, 1, 1, 8)
    kept = images.clone()
    row = np.asarray(image_grid(images, columns=1, zoom=1, gap=0))[0, :, 0]
    assert row.tolist() == [0, 0, 0, 128, 255, 255, 255, 0]
    assert torch.equal(images.nan_to_num(nan=7), kept.nan_to_num(nan=7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_drawn(dtype: torch.dtype) -> None:
    images = torch.tensor([-1.0, 0.5, 1.0]).view(1, 1, 1, 3)
    assert image_grid(images.to(dtype), 1) == image_grid(images, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_comparison_shows_both_rows_and_their_difference(channels: int) -> None:
    reference = random_images(4, channels, height=20, width=40)
    images = reference.clone()
    images[1, :, 5, 7] += 0.25
    images[2, :, 6, 8] -= 0.5
    sheet = comparison_sheet(reference, images, ("sequential", "window:32"), zoom=2)
    grid_height, width = 20 * 2 + 4, 4 * (40 * 2 + 2) + 2
    assert sheet.size == (width, 3 * (CAPTION + grid_height))

    drawn = np.asarray(sheet)
    panels = [drawn[i * (CAPTION + grid_height) :][: CAPTION + grid_height] for i in range(3)]
    difference = torch.full_like(images, -1.0)
    difference[1, :, 5, 7] = 0.0  # half of the largest
    difference[2, :, 6, 8] = 1.0
    for panel, shown in zip(panels, (reference, images, difference), strict=True):
        assert np.array_equal(panel[CAPTION:], np.asarray(image_grid(shown, columns=4)))
        assert (panel[:CAPTION] < 128).any(axis=2).sum() > 50, "no caption"
    captions = [panel[:CAPTION] for panel in panels]
    assert not any(np.array_equal(captions[i], captions[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_comparison_holds_its_captions_and_at_most_20_images_in_a_row() -> None:
    narrow = comparison_sheet(*[random_images(1)] * 2, ("a strategy of a long name", "b"))
    assert narrow.width > 150
    right = np.asarray(narrow)[:CAPTION, -4:]
    assert (right == WHITE).all(), "a caption is cut"
    wide = comparison_sheet(*[random_images(45)] * 2, ("a", "b"))
    assert wide.size == (20 * (4 * 2 + 2) + 2, 3 * (CAPTION + 3 * (3 * 2 + 2) + 2))


@pytest.mark.parametrize("lost", [False, True])
def test_equal_rows_have_a_black_difference(lost: bool) -> None:
    images = random_images(2)
    if lost:
        images[0] = torch.nan
    sheet = np.asarray(comparison_sheet(images, images, ("a", "b"), zoom=1))
    height = 3 + 4
    grid = sheet[-height:, : 2 * (4 + 2) + 2]
    assert np.array_equal(grid, np.asarray(image_grid(torch.full_like(images, -1), 2, zoom=1)))


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = tmp_path / "a.png", image_grid(random_images(2, 3), 2)
    save_png(image, path)
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "write_bytes"):
        monkeypatch.setattr(*((os, name) if name == "replace" else (Path, name)), no_space)
        with pytest.raises(OSError, match="No space"):
            save_png(image_grid(random_images(1), 1), path)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["a.png"]
        assert path.read_bytes() == before
    with pytest.raises(OSError):
        save_png(image, tmp_path / "missing" / "a.png")
