"""Differences between samples of the same latents, against NumPy."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from jacobiflow.evaluation import PixelDifference, SampleErrors, pixel_difference, sample_errors
from tests.helpers import scoring
from tests.helpers.scoring import levels, pixel_figures

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf


def test_errors_are_max_mean_and_rms_over_entries() -> None:
    exact = torch.zeros(2, 1, 2)
    samples = torch.tensor([3.0, -4.0, 0.0, 0.0]).view_as(exact)
    assert sample_errors(samples, exact) == SampleErrors(2, 4.0, 7 / 4, 2.5)
    many = torch.zeros(1, 2000, 2000)  # summed in float64
    assert sample_errors(many + 0.1, many).mean == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def random_images(seed: int) -> Tensor:
    """Images with some entries outside [-1, 1]."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.7, (5, 3, 6, 4)).astype(np.float32))


def test_sample_errors_are_those_of_numpy() -> None:
    exact = random_images(0)
    images = exact + 0.1 * random_images(1)
    errors, (largest, rms) = sample_errors(images, exact), scoring.difference(images, exact)
    assert (errors.num, errors.max) == (5, largest)  # values outside [-1, 1] are not clipped
    assert errors.rms == pytest.approx(rms, rel=1e-12)
    assert errors.psnr == pytest.approx(20 * math.log10(2 / rms), rel=1e-12)
    assert asdict(errors.pixels) == pixel_figures(levels(images), levels(exact))
    white, black = (torch.full((1, 1, 2, 2), value, dtype=torch.uint8) for value in (255, 0))
    assert pixel_difference(black, white) == pixel_difference(white, black) == PixelDifference(1.0, 255)


def test_nan_on_both_sides_counts_as_equal_and_on_one_side_as_infinitely_far() -> None:
    exact = random_images(0).double()
    exact[1] = NAN
    assert sample_errors(exact.float(), exact) == SampleErrors(5, 0.0, 0.0, 0.0, INF, PixelDifference(0.0, 0))
    errors = sample_errors(exact + 0.25, exact)
    assert (errors.max, errors.rms) == (pytest.approx(0.25), pytest.approx(0.25 * math.sqrt(4 / 5)))
    for value in (NAN, INF):
        broken = exact.clone()
        broken[2] = value
        for errors in (sample_errors(broken, exact), sample_errors(exact, broken)):
            assert (errors.max, errors.rms, errors.psnr) == (INF, INF, -INF)
            shown = broken.nan_to_num(nan=-1.0, posinf=1.0)
            assert asdict(errors.pixels) == pixel_figures(levels(shown), levels(exact))
