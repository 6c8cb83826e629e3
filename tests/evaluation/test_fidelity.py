"""How near samples are to the exact ones, and histograms of certificates: against NumPy; and their picture."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from jacobiflow.evaluation import Fidelity, PixelDifference, certificate_histogram, fidelity, pixel_difference
from jacobiflow.plots import certificate_figure, save_png

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = PixelDifference(0.0, 0)
NAN, INF = math.nan, math.inf
GENERATOR = np.random.default_rng


def random_images(seed: int, num: int = 5, channels: int = 3) -> Tensor:
    """Images that leave [-1, 1] here and there."""
    return torch.from_numpy(GENERATOR(seed).normal(0, 0.7, (num, channels, 6, 4)).astype(np.float32))


def levels(images: Tensor) -> np.ndarray:
    """8-bit values; what is NaN is black."""
    x = np.nan_to_num(images.numpy().astype(np.float32), nan=-1.0)
    return np.round((np.clip(x, -1, 1) + 1) * np.float32(127.5)).astype(int)


# ------------------------------------------------------------------------------------------------------------ fidelity


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_fidelity_is_numpys(scale: float, channels: int) -> None:
    exact = random_images(0, channels=channels)
    images = exact + scale * random_images(1, channels=channels)
    found = fidelity(images, exact)
    difference = np.abs(images.numpy().astype(float) - exact.numpy().astype(float))
    rms = math.sqrt((difference**2).mean())
    assert found.num == 5
    assert found.max == difference.max()  # values outside [-1, 1] are not clipped
    assert found.rms == pytest.approx(rms, rel=1e-12)
    assert found.psnr == pytest.approx(20 * math.log10(2 / rms), rel=1e-12)
    apart = np.abs(levels(images) - levels(exact))
    assert found.pixels == PixelDifference(pytest.approx((apart > 0).mean()), apart.max())  # type: ignore[arg-type]
    assert found.pixels.share > 0 or scale < 1e-5


def test_one_entry_off_by_the_whole_range() -> None:
    exact = torch.full((1, 1, 10, 10), -1.0)
    images = exact.clone()
    images[0, 0, 3, 4] = 1.0
    found = fidelity(images, exact)
    assert (found.max, found.rms, found.psnr) == (2.0, pytest.approx(0.2), pytest.approx(20.0))
    assert found.pixels == PixelDifference(0.01, 255)  # unsigned bytes would wrap


def test_equal_images_have_an_infinite_psnr() -> None:
    images = random_images(0)
    assert fidelity(images, images.clone()) == Fidelity(5, 0.0, 0.0, INF, SAME)


def test_what_is_lost_on_both_sides_counts_as_equal() -> None:
    exact = random_images(0)
    exact[1] = NAN
    exact[2, 0, 0, 0] = NAN
    assert fidelity(exact.clone(), exact) == Fidelity(5, 0.0, 0.0, INF, SAME)
    images = exact + 0.5
    kept = ~np.isnan(exact.numpy())
    found = fidelity(images, exact)
    difference = np.where(kept, images.numpy().astype(float) - exact.numpy().astype(float), 0)
    assert found.max == np.abs(difference).max()
    assert found.rms == pytest.approx(math.sqrt((difference**2).mean()))
    assert found.pixels.share == pytest.approx((levels(images) != levels(exact)).mean())


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_lost_on_one_side_is_infinitely_far(value: float, swapped: bool) -> None:
    exact = random_images(0)
    lost = exact.clone()
    lost[1] = value
    found = fidelity(exact, lost) if swapped else fidelity(lost, exact)
    assert (found.max, found.rms, found.psnr) == (INF, INF, -INF)
    black = lost.nan_to_num(nan=-1.0, posinf=1.0)
    assert found.pixels.share == pytest.approx((levels(black) != levels(exact)).mean())


def test_inputs_are_left_alone_and_other_dtypes_are_taken() -> None:
    exact = random_images(0).double()
    exact[0] = NAN
    images = exact + 0.25
    before = images.clone(), exact.clone()
    found = fidelity(images, exact)
    assert found.max == pytest.approx(0.25)
    for one, other in zip((images, exact), before, strict=True):
        assert torch.equal(one.nan_to_num(nan=9), other.nan_to_num(nan=9))
    half = torch.tensor([-1.0, 0.5]).view(1, 1, 1, 2).to(torch.bfloat16)
    assert fidelity(half, half.float()).rms == 0


def test_pixels_are_those_of_all_images() -> None:
    one = torch.from_numpy(GENERATOR(0).integers(0, 256, (7, 3, 5, 5), dtype=np.uint8))
    other = torch.from_numpy(GENERATOR(1).integers(0, 256, (7, 3, 5, 5), dtype=np.uint8))
    other[:3] = one[:3]
    apart = np.abs(one.numpy().astype(int) - other.numpy().astype(int))
    want = PixelDifference(pytest.approx((apart > 0).mean()), apart.max())  # type: ignore[arg-type]
    assert pixel_difference(one, other) == want
    assert pixel_difference(other, one) == want
    assert pixel_difference(one, one) == SAME


# ----------------------------------------------------------------------------------------------------------- histogram


def around(power: int, dtype: type = np.float32) -> list[float]:
    """A power of ten and its neighbours."""
    value = dtype(10.0**power)
    return [float(np.nextafter(value, dtype(0))), float(value), float(np.nextafter(value, dtype(INF)))]


def assert_histogram(found: dict[str, Any], values: np.ndarray) -> None:
    """All that is promised of the histogram of float64 values."""
    finite = values[np.isfinite(values) & (values > 0)]
    edges, counts = found["edges"], found["counts"]
    assert found["zero"] == (values == 0).sum()
    assert found["infinite"] == np.isinf(values).sum()
    assert sum(counts) + found["zero"] + found["infinite"] == len(values)
    if not len(finite):
        assert counts == []
        assert len(edges) <= 1
    else:
        assert len(edges) == len(counts) + 1
        digits, powers = zip(*(f"{edge:.0e}".split("e") for edge in edges), strict=True)
        assert edges == [float(f"{digit}e{power}") for digit, power in zip(digits, powers, strict=True)]
        assert all(pair in {("1", "2"), ("2", "5"), ("5", "1")} for pair in pairwise(digits))
        assert all(1.9 < high / low < 2.6 for low, high in pairwise(edges))
        assert edges[0] <= finite.min()
        assert finite.max() < edges[-1]
        assert counts[0] and counts[-1]
        assert counts == [((low <= finite) & (finite < high)).sum() for low, high in pairwise(edges)]
    assert found["max"] == values.max()
    assert (values <= found["median"]).sum() * 2 >= len(values) <= (values >= found["median"]).sum() * 2


CERTIFICATES = st.one_of(
    st.floats(0, INF, width=32),
    st.floats(-9, -1).map(lambda power: float(np.float32(10.0**power))),
    st.integers(-44, 37).flatmap(lambda power: st.sampled_from(around(power))),
)


@given(st.lists(CERTIFICATES, min_size=1, max_size=12))
@example([0.0])
@example([INF])
@example([0.0, INF, INF])
@example([around(-3)[0]])
@example([around(-3)[1], around(-3)[2]])
@example([1e-45, 3.4e38])
@settings(max_examples=300, deadline=None)
def test_every_certificate_lies_in_its_bin(values: list[float]) -> None:
    certificate = torch.tensor(values)
    assert_histogram(certificate_histogram(certificate), certificate.double().numpy())


@pytest.mark.parametrize("power", [-300, -3, 2, 23, 306, 307])
def test_every_float64_certificate_lies_in_its_bin(power: int) -> None:
    values = np.array([*around(power, np.float64), 1e23 if power == 23 else 1.0])
    assert_histogram(certificate_histogram(torch.from_numpy(values)), values)


# ------------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("tolerance", [None, 1e-3])
@pytest.mark.parametrize(
    ("values", "names", "heights"),
    [
        ([1.5e-4, 3e-4, 4e-4], ["0.0001 to 0.0002", "0.0002 to 0.0005"], [1, 2]),
        ([3e-3, 3e-2], ["0.002 to 0.005", "0.005 to 0.01", "0.01 to 0.02", "0.02 to 0.05"], [1, 0, 0, 1]),
        ([0.0, 0.0, 5.0, INF], ["0", "5 to 10", "lost"], [2, 1, 1]),
        ([0.0], ["0"], [1]),
        ([INF] * 1500, ["lost"], [1500]),
        ([0.0, INF], ["0", "lost"], [1, 1]),
    ],
)
def test_certificates_are_drawn(
    values: list[float], names: list[str], heights: list[int], tolerance: float | None, tmp_path: Path
) -> None:
    figure = certificate_figure(certificate_histogram(torch.tensor(values)), tolerance)
    save_png(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.width > read.height > 200
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == names
    assert [patch.get_height() for patch in axis.patches] == heights
    assert [text.get_text() for text in axis.texts] == [f"{height:,}" for height in heights]
    assert axis.get_xlabel().endswith("of a sample" if tolerance is None else "tolerance asked for: 0.001")


@pytest.mark.parametrize(("least", "bars"), [(1.5e-7, 16), (3e-4, 6), (7e-4, 5), (3e-3, 3)])
def test_labels_do_not_touch(least: float, bars: int) -> None:
    figure = certificate_figure(certificate_histogram(torch.tensor([0.0, least, 7e-3])), 1e-2)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == bars
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
