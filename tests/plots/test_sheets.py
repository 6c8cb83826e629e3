"""Sheets of images: every pixel where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jacobiflow.plots import comparison_sheet, image_grid, rows_sheet, save_png, trace_sheet

WHITE, CAPTION = 255, 32


def random_images(num: int, channels: int = 1, height: int = 3, width: int = 4) -> Tensor:
    levels = torch.randint(256, (num, channels, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def assert_placed(sheet: NDArray[np.uint8], images: Tensor, columns: int, zoom: int, gap: int = 4) -> None:
    """The sheet is exactly the images in rows of `columns`, with white between and around them."""
    height, width = images.shape[2] * zoom, images.shape[3] * zoom
    rows = -(-len(images) // columns)
    want = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), WHITE, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        levels = np.clip(np.rint((image.double().numpy() + 1) * 127.5), 0, 255).transpose(1, 2, 0)
        want[top : top + height, left : left + width] = levels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    assert np.array_equal(sheet[:, : want.shape[1]], want)
    assert (sheet[:, want.shape[1] :] == WHITE).all()


@pytest.mark.parametrize(("channels", "columns", "zoom", "gap"), [(1, 3, 2, 2), (3, 7, 3, 1)])
def test_a_grid_places_every_pixel(channels: int, columns: int, zoom: int, gap: int) -> None:
    images = random_images(5, channels)
    sheet = image_grid(images, columns, zoom, gap)
    assert sheet.mode == "RGB"
    assert_placed(np.asarray(sheet), images, columns, zoom, gap)
    assert image_grid(images.double(), columns, zoom, gap) == sheet
    odd = torch.tensor([-torch.inf, -1.5, -1, 0, 1, 1.5, torch.inf, torch.nan]).view(1, 1, 1, 8)  # clipped; NaN: black
    assert np.asarray(image_grid(odd, 1, 1, 0))[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255, 0]


def test_rows_lie_under_their_captions() -> None:
    zoom, counts, names = 2, (5, 13, 1), ("guess 0, Jacobi-3", "[6-8-32-10] (gypq)", "sequential")
    rows = list(zip(names, random_images(sum(counts), 3, 5, 7).split(counts), strict=True))
    pixels, top, captions = np.asarray(rows_sheet(rows, zoom)), 0, []
    for (_, images), lines in zip(rows, (1, 2, 1), strict=True):  # at most 10 images a line
        bottom = top + CAPTION + lines * (5 * zoom + 4) + 4
        captions.append(pixels[top : top + CAPTION])
        assert (captions[-1] < 128).any() and (captions[-1][:, -4:] == WHITE).all(), "no caption, or one cut off"
        assert_placed(pixels[top + CAPTION : bottom], images, min(len(images), 10), zoom)
        top = bottom
    assert top == len(pixels)
    assert not any(np.array_equal(captions[i], captions[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    narrow = np.asarray(rows_sheet([("a caption far wider than the image", random_images(1))]))
    assert narrow.shape[1] > 150 and (narrow[:CAPTION, -4:] == WHITE).all()


def test_images_are_drawn_four_times_their_size_with_the_names_of_columns() -> None:
    images = random_images(20, 1, 28, 28)
    plain = np.asarray(rows_sheet([("a", images)]))
    assert_placed(plain[CAPTION:], images, columns=10, zoom=4)
    names = [f"class {i % 10}" for i in range(20)]
    named = np.asarray(rows_sheet([("a", images)], columns=names))
    assert np.array_equal(named[CAPTION:], plain)
    dark = (named[:CAPTION] < 128).any(axis=(0, 2))
    assert all(dark[116 * column + 8 : 116 * column + 112].any() for column in range(10))
    assert not any(dark[116 * column - 2 : 116 * column + 6].any() for column in range(1, 10))
    assert rows_sheet([("a", images)], columns=[*names[:10], *names[10:][::-1]]).size == Image.fromarray(plain).size


@pytest.mark.parametrize("equal", [True, False])
def test_a_comparison_shows_both_and_their_difference(equal: bool) -> None:
    reference = random_images(4, 3, height=20, width=40)
    images, difference = reference.clone(), torch.full_like(reference, -1.0)
    reference[0], images[0] = torch.nan, torch.nan
    if not equal:
        images[1, :, 5, 7] += 0.25
        images[2, :, 6, 8] -= 0.5
        difference[1, :, 5, 7], difference[2, :, 6, 8] = 0.0, 1.0  # half of the largest, and the largest
    pixels = np.asarray(comparison_sheet(reference, images, ("sequential", "window:32"), zoom=2))
    panels = pixels.reshape(3, -1, *pixels.shape[1:])
    for panel, shown in zip(panels, (reference, images, difference), strict=True):
        assert_placed(panel[CAPTION:], shown.nan_to_num(nan=-1.0), columns=4, zoom=2)


@pytest.mark.parametrize(("denoised", "blocks"), [(True, 2), (False, 11)])
def test_a_trace_is_a_line_a_sample_and_a_column_a_block(denoised: bool, blocks: int) -> None:
    columns, zoom = 1 + blocks + denoised, 6
    images = random_images(3 * columns, 1, height=8, width=8).view(columns, 3, 1, 8, 8)
    pixels = np.asarray(trace_sheet(list(images), denoised, zoom))
    assert_placed(pixels[CAPTION:], images.transpose(0, 1).flatten(0, 1), columns, zoom)
    dark = (pixels[:CAPTION] < 128).any(axis=(0, 2))
    for column in range(columns):
        left, right = column * (8 * zoom + 4), (column + 1) * (8 * zoom + 4)
        assert dark[left + 2 : right].any() and not dark[left : left + 2].any(), f"caption of column {column}"


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    image = image_grid(random_images(2, 3), 2)
    save_png(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert np.array_equal(np.asarray(read), np.asarray(image))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError):
        save_png(image, tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png"]
