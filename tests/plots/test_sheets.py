"""Sheets of images, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jacobiflow.data import image_grid
from jacobiflow.plots import comparison_sheet, rows_sheet, save_png
from tests.helpers.pictures import CAPTION, GAP, WHITE, assert_placed, random_images


@pytest.mark.parametrize(("channels", "columns", "zoom"), [(1, 3, 2), (3, 7, 3)])
def test_a_grid_places_every_pixel(channels: int, columns: int, zoom: int, tmp_path: Path) -> None:
    images = random_images(5, channels)
    save_png(image_grid(images, columns, zoom), tmp_path / "a.png")
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.mode == "RGB"
    assert_placed(np.asarray(sheet), images, columns, zoom)
    odd = torch.tensor([-torch.inf, -1.5, -1, 0, 1, 1.5, torch.inf, torch.nan]).view(1, 1, 1, 8)  # clipped; NaN: black
    assert np.asarray(image_grid(odd, 1, 1))[GAP, GAP:-GAP, 0].tolist() == [0, 0, 0, 128, 255, 255, 255, 0]


def test_rows_lie_under_their_captions() -> None:
    counts, names = (5, 13, 1), ("guess 0, Jacobi-3", "[6-8-32-10] (gypq)", "sequential")
    rows = list(zip(names, random_images(sum(counts), 3).split(counts), strict=True))
    pixels, top = np.asarray(rows_sheet(rows)), 0
    for (_, images), lines in zip(rows, (1, 2, 1), strict=True):  # at most 10 images a line
        bottom = top + CAPTION + lines * (3 * 2 + GAP) + GAP
        caption = pixels[top : top + CAPTION]
        assert (caption < 128).any() and (caption[:, -4:] == WHITE).all(), "no caption, or one cut off"
        assert_placed(pixels[top + CAPTION : bottom], images, min(len(images), 10), zoom=2)
        top = bottom
    assert top == len(pixels)
    narrow = np.asarray(rows_sheet([("a caption far wider than the image", random_images(1))]))
    assert (narrow[:CAPTION, -4:] == WHITE).all(), "cut off"


def test_a_comparison_shows_both_and_enlarges_the_sample_that_differs_most() -> None:
    reference = random_images(4, 3, height=20)
    images = reference.clone()
    reference[0], images[0] = torch.nan, torch.nan  # both are drawn black, so they do not differ
    images[1, :, 5, 7] = 0.6 * reference[1, :, 5, 7]
    reference[2, 1, 6, 8], images[2, 1, 6, 8] = 1.0, -1.0  # all 255 levels
    reference[2, 1, 6, 9], images[2, 1, 6, 9] = 0.5, 0.0
    pixels = np.asarray(comparison_sheet(reference, images, ("sequential", "window:32")))
    rows = 2 * (CAPTION + 5 * 20 + 2 * GAP)
    for panel, expected in zip(np.split(pixels[:rows], 2), (reference, images), strict=True):
        assert_placed(panel[CAPTION:], expected.nan_to_num(nan=-1.0), columns=4, zoom=5)
    difference = torch.ones_like(images[2])
    difference[:, 6, 8], difference[:, 6, 9] = -1.0, 0.5
    enlarged = torch.stack([reference[2], images[2], difference])
    assert_placed(pixels[rows + 2 * CAPTION :], enlarged, columns=3, zoom=6)


@pytest.mark.parametrize("names", [list("abcd"), list("abab"), []])
def test_names_stand_above_each_line_or_once_if_all_lines_have_the_same(names: list[str]) -> None:
    images, step = random_images(4, width=60), 3 * 5 + GAP
    pixels = np.asarray(image_grid(images, columns=2, zoom=5, names=names))
    lines = 0 if not names else 2 - (names[0] == names[2])
    assert len(pixels) == 2 * step + GAP + lines * CAPTION
    for row in range(2):
        top = row * step + min(row + 1, lines) * CAPTION + GAP
        line = np.pad(pixels[top : top + step - GAP], ((GAP, GAP), (0, 0), (0, 0)), constant_values=WHITE)
        assert_placed(line, images[2 * row : 2 * row + 2], columns=2, zoom=5)
        assert row >= lines or (pixels[top - CAPTION : top] < 128).any(), "no name"


@pytest.mark.parametrize("name", ["crossed fingers dark skin", "a" * 40, "one word " * 30])
def test_a_long_name_stays_above_its_image_and_is_cut_after_three_lines(name: str) -> None:
    images = torch.full((2, 1, 30, 30), -1.0)
    pixels = np.asarray(image_grid(images, columns=2, zoom=4, names=[name, ""]))
    caption = pixels[: len(pixels) - 4 * 30 - 2 * GAP]
    assert len(caption) <= 3 * CAPTION
    assert (caption[:, : 4 * 30 + GAP] < 128).any() and (caption[:, 4 * 30 + GAP :] == WHITE).all()


@pytest.mark.parametrize("shift", [0.0, 1e-3, 1e-2])
def test_nothing_is_enlarged_if_8_bits_do_not_show_the_difference(shift: float) -> None:
    reference = torch.zeros(1, 1, 4, 112)
    sheet = np.asarray(comparison_sheet(reference, reference + shift, ("a", "b")))
    rows = 2 * (CAPTION + 3 * 4 + 2 * GAP) + CAPTION
    assert len(sheet) == rows + (CAPTION + 3 * 4 + 2 * GAP) * (shift == 1e-2)
