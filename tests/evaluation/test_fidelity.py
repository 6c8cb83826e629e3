"""Errors of samples against the exact ones, by NumPy."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from jacobiflow.evaluation import Fidelity, PixelDifference, fidelity, pixel_difference
from tests.helpers.scoring import levels, pixel_figures

NAN, INF = math.nan, math.inf


def random_images(seed: int) -> Tensor:
    """Images that leave [-1, 1] here and there."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.7, (5, 3, 6, 4)).astype(np.float32))


@pytest.mark.parametrize("scale", [1e-3, 3.0])
def test_fidelity_is_numpys(scale: float) -> None:
    exact = random_images(0)
    images = exact + scale * random_images(1)
    errors = fidelity(images, exact)
    difference = np.abs(images.numpy().astype(float) - exact.numpy().astype(float))
    rms = math.sqrt((difference**2).mean())
    assert errors.num == 5
    assert errors.max == difference.max()  # values outside [-1, 1] are not clipped
    assert errors.rms == pytest.approx(rms, rel=1e-12)
    assert errors.psnr == pytest.approx(20 * math.log10(2 / rms), rel=1e-12)
    assert asdict(errors.pixels) == pixel_figures(levels(images), levels(exact))
    white, black = (torch.full((1, 1, 2, 2), value, dtype=torch.uint8) for value in (255, 0))
    assert pixel_difference(black, white) == pixel_difference(white, black) == PixelDifference(1.0, 255)


def test_nan_on_both_sides_counts_as_equal_and_on_one_side_as_infinitely_far() -> None:
    exact = random_images(0).double()
    exact[1] = NAN
    assert fidelity(exact.float(), exact) == Fidelity(5, 0.0, 0.0, INF, PixelDifference(0.0, 0))
    errors = fidelity(exact + 0.25, exact)
    assert (errors.max, errors.rms) == (pytest.approx(0.25), pytest.approx(0.25 * math.sqrt(4 / 5)))
    for value in (NAN, INF):
        broken = exact.clone()
        broken[2] = value
        for errors in (fidelity(broken, exact), fidelity(exact, broken)):
            assert (errors.max, errors.rms, errors.psnr) == (INF, INF, -INF)
            shown = broken.nan_to_num(nan=-1.0, posinf=1.0)
            assert asdict(errors.pixels) == pixel_figures(levels(shown), levels(exact))
