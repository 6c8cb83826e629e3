"""How close samples are to the exact ones, and histograms of certificates, against NumPy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from jacobiflow.evaluation import Fidelity, PixelDifference, certificate_histogram, fidelity, pixel_difference

NAN, INF = math.nan, math.inf


def random_images(seed: int) -> Tensor:
    """Images that leave [-1, 1] here and there."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.7, (5, 3, 6, 4)).astype(np.float32))


def levels(images: Tensor) -> np.ndarray:
    """8-bit values; what is NaN is black."""
    x = np.nan_to_num(images.numpy().astype(np.float32), nan=-1.0)
    return np.round((np.clip(x, -1, 1) + 1) * np.float32(127.5)).astype(int)


@pytest.mark.parametrize("scale", [1e-3, 3.0])
def test_fidelity_is_numpys(scale: float) -> None:
    exact = random_images(0)
    images = exact + scale * random_images(1)
    found = fidelity(images, exact)
    difference = np.abs(images.numpy().astype(float) - exact.numpy().astype(float))
    rms = math.sqrt((difference**2).mean())
    assert found.num == 5
    assert found.max == difference.max()  # values outside [-1, 1] are not clipped
    assert found.rms == pytest.approx(rms, rel=1e-12)
    assert found.psnr == pytest.approx(20 * math.log10(2 / rms), rel=1e-12)
    steps = np.abs(levels(images) - levels(exact))
    assert found.pixels == PixelDifference(pytest.approx((steps > 0).mean()), steps.max())  # type: ignore[arg-type]
    white, black = (torch.full((1, 1, 2, 2), value, dtype=torch.uint8) for value in (255, 0))
    assert pixel_difference(black, white) == pixel_difference(white, black) == PixelDifference(1.0, 255)


def test_nan_on_both_sides_counts_as_equal_and_on_one_side_as_infinitely_far() -> None:
    exact = random_images(0).double()
    exact[1] = NAN
    assert fidelity(exact.float(), exact) == Fidelity(5, 0.0, 0.0, INF, PixelDifference(0.0, 0))
    found = fidelity(exact + 0.25, exact)
    assert (found.max, found.rms) == (pytest.approx(0.25), pytest.approx(0.25 * math.sqrt(4 / 5)))
    for value in (NAN, INF):
        lost = exact.clone()
        lost[2] = value
        for found in (fidelity(lost, exact), fidelity(exact, lost)):
            assert (found.max, found.rms, found.psnr) == (INF, INF, -INF)
            shown = lost.nan_to_num(nan=-1.0, posinf=1.0)
            assert found.pixels.share == pytest.approx((levels(shown) != levels(exact)).mean())


@given(st.lists(st.floats(0, INF, width=32) | st.sampled_from([1e-3, 0.1, 1.0, 1e3]), min_size=1, max_size=12))
@example([0.0, INF, INF])
@example([1e-45, 3.4e38])
@settings(max_examples=50, deadline=None)
def test_every_certificate_lies_in_its_bin(values: list[float]) -> None:
    x = np.array(values)
    found = certificate_histogram(torch.from_numpy(x))
    edges, counts, finite = found["edges"], found["counts"], x[np.isfinite(x) & (x > 0)]
    assert (found["zero"], found["infinite"], found["max"]) == ((x == 0).sum(), np.isinf(x).sum(), x.max())
    assert {f"{edge:.0e}"[0] for edge in edges} <= set("125")
    assert all(1.9 < high / low < 2.6 for low, high in pairwise(edges))
    assert counts == [((low <= finite) & (finite < high)).sum() for low, high in pairwise(edges)]
    assert sum(counts) == len(finite)
