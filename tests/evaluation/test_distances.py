"""Distances between sets of features, against NumPy; files of statistics."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jacobiflow.data import DataError, bundled_emoji, bundled_fashion
from jacobiflow.evaluation import (
    ConvolutionalFeatures,
    Statistics,
    extract,
    frechet_distance,
    kernel_distance,
    precision_recall,
)

pytest.importorskip("torch_fidelity")
from torchmetrics.image.fid import FrechetInceptionDistance

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(num: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def frechet(real: Tensor, fake: Tensor) -> float:
    """tr((S S')^(1/2)) is the sum of the singular values of A B^T, where S = A^T A and S' = B^T B, of any rank."""
    x, y = (side.double().numpy() for side in (real, fake))
    a, b = ((side - side.mean(axis=0)) / np.sqrt(len(side) - 1) for side in (x, y))
    trace = (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + trace)


def between(real: Tensor, fake: Tensor) -> float:
    return frechet_distance(Statistics.of(real), Statistics.of(fake))


@pytest.fixture(scope="module")
def features() -> Tensor:
    return extract(ConvolutionalFeatures.bundled("fashion"), [bundled_fashion().images[:300]])


@pytest.mark.parametrize(("num", "other", "dim"), [(9, 12, 1), (300, 200, 17), (2, 2, 3), (5, 100, 32), (100, 5, 32)])
def test_frechet_distance_is_numpys(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    # Eigenvalues that are 0 but for rounding have square roots near 1e-8 of the largest's.
    assert between(real, fake) == pytest.approx(frechet(real, fake), rel=1e-8 if min(num, other) > dim else 1e-6)
    assert between(fake, real) == pytest.approx(between(real, fake), rel=1e-6)
    assert between(real, real.flip(0)) == pytest.approx(0, abs=1e-5)
    v = torch.linspace(-2, 3, dim, dtype=torch.float64)
    assert between(real, real + v) == pytest.approx(float(v.square().sum()), rel=1e-6)


def test_fashion_fid_is_that_of_torchmetrics(features: Tensor) -> None:
    network, images = ConvolutionalFeatures.bundled("fashion"), bundled_fashion().images[:300]
    noise = 40 * torch.randn(images[:200].shape, generator=torch.Generator().manual_seed(0))
    noisy = (images[:200] + noise).round().clamp(0, 255).to(torch.uint8)
    metric = FrechetInceptionDistance(feature=network)
    metric.update(images, real=True)
    metric.update(noisy, real=False)
    fake = extract(network, [noisy])
    found = between(features, fake)
    assert found > 1
    assert found == pytest.approx(float(metric.compute()), rel=1e-5)  # which is float32
    assert found == pytest.approx(frechet(features, fake), rel=1e-6)


def test_sets_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^statistics of 3 features against 4: give statistics of the same features$"):
        between(normal(9, 3), normal(9, 4))
    for real, fake in ((1, 9), (9, 1)):
        with pytest.raises(DataError, match=f"between {real} and {fake} images: give at least 2 of each$"):
            between(normal(real, 3), normal(fake, 3))
    huge = Statistics(5, 1e200 * torch.ones(4).double(), torch.eye(4).double())
    bad = [normal(5, 4).fill_(value) for value in (math.nan, math.inf)]
    for pair in ((Statistics.of(normal(5, 4)), Statistics.of(bad[0])), (Statistics.of(bad[1]),) * 2, (huge, huge)):
        with pytest.raises(DataError, match="not finite"):
            frechet_distance(*pair)
    for measure, least in ((kernel_distance, 2), (precision_recall, 4)):
        measure(normal(least, 3), normal(least, 3, seed=1))
        with pytest.raises(DataError, match=f"{least} images against {least - 1}: give at least {least} of each$"):
            measure(normal(least, 3), normal(least - 1, 3))
        with pytest.raises(DataError, match="3 features against 2"):
            measure(normal(9, 3), normal(9, 2))
        with pytest.raises(DataError, match="not finite"):
            measure(normal(5, 4), bad[1])
    with pytest.raises(DataError, match="statistics of 1 images: give at least 2"):
        Statistics.of(normal(1, 3)).save(tmp_path / "one.pth")
    assert not list(tmp_path.iterdir())


def test_statistics_are_sums_and_round_trip(tmp_path: Path) -> None:
    one, two, x = tmp_path / "one_fid_stats.pth", tmp_path / "two_fid_stats.pth", normal(50, 5)
    statistics = Statistics.of(x)
    assert statistics.num == 50
    assert statistics.sum.dtype == statistics.outer.dtype == torch.float64
    torch.testing.assert_close(statistics.sum, x.sum(dim=0))
    torch.testing.assert_close(statistics.outer, x.T @ x)
    torch.testing.assert_close(statistics.covariance(), torch.cov(x.T))
    two.write_bytes(b"is replaced")
    statistics.save(one)
    Statistics.load(str(one)).save(str(two))
    read = Statistics.load(two)
    assert read.num == 50 and torch.equal(read.sum, statistics.sum) and torch.equal(read.outer, statistics.outer)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(tmp_path.iterdir()) == [one, two]
    one.write_bytes(saved(state(sum=torch.zeros(3), cov_sum=torch.zeros(3, 3))))
    assert not Statistics.load(one).covariance().any()


def state(**changes: Any) -> dict[str, Any]:
    entries = {"num_samples": torch.tensor(9), "sum": torch.ones(3).double(), "cov_sum": torch.eye(3).double()}
    return {f"real_features_{name}": value for name, value in (entries | changes).items() if value is not None}


def saved(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def cancelling() -> dict[str, Tensor]:
    """A covariance with an eigenvalue of -1 in 9, below means of a thousand."""
    mean = torch.full((3,), 1e3).double()
    return {
        "sum": 9 * mean,
        "cov_sum": 9 * torch.outer(mean, mean) + torch.diag(torch.tensor([9.0, 9.0, -1.0]).double()),
    }


EXPECTED = "give a file that Statistics.save wrote, or a *_fid_stats.pth of the original TarFlow code"
BROKEN = {
    "no file of tensors": b"no statistics\n",
    "no entry 'real_features_sum'": saved(state(sum=None)),
    "is_floating_point": saved(state(sum=[1.0, 1.0, 1.0])),
    "a NaN or an infinity": saved(state(sum=torch.full((3,), torch.nan))),
    "an infinity": saved(state(sum=1e200 * torch.ones(3).double())),  # overflows in the covariance
    "of 1 images": saved(state(num_samples=torch.tensor(1))),
    "not symmetric": saved(state(cov_sum=torch.ones(3, 3).triu())),
    "a negative eigenvalue": saved(state(cov_sum=-torch.eye(3))),
    "with a negative eigenvalue": saved(state(sum=torch.zeros(3), cov_sum=torch.ones(3, 3).double().fill_diagonal_(0))),
    "of 0 images|a number of images": saved(state(num_samples=torch.ones(2, dtype=torch.int64))),
    "a number of images": saved(state(num_samples=torch.tensor(True))),
    "covariances with a negative": saved(state(**cancelling())),
    r"a tensor \(1000000, 1000000\) of 8 bytes": saved(state(cov_sum=torch.ones(()).double().expand(10**6, 10**6))),
}


def test_a_broken_file_of_statistics_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for reason, content in {"cannot be read": None, **BROKEN}.items():
        path = tmp_path / ("stats.pth" if content else "folder")
        if content:
            path.write_bytes(content)
        with pytest.raises(DataError, match=reason) as caught:
            Statistics.load(path)
        assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith(EXPECTED)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "num"), [("fashion", 60_000), ("emoji", 1229)])
def test_bundled_statistics_are_of_the_training_images(kind: str, num: int, features: Tensor) -> None:
    statistics, found = Statistics.bundled(kind), features.double()  # of 300 of them
    if kind == "emoji":
        found = extract(ConvolutionalFeatures.bundled(kind), [bundled_emoji().images]).double()
    deviation = statistics.covariance().diagonal().sqrt()
    assert statistics.num == num
    assert ((found.mean(dim=0) - statistics.sum / num).abs() <= 5 * deviation / len(found) ** 0.5 + 1e-6).all()
    torch.testing.assert_close(found.std(dim=0), deviation, rtol=0.4, atol=1e-3)


def unbiased_mmd(real: Tensor, fake: Tensor) -> float:
    """That of the kernel (x . y / d + 1)^3, a mean over pairs of different elements."""
    x, y = real.double().numpy(), fake.double().numpy()
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return float(sum(k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)) - 2 * xy.mean())


def test_kernel_distance_is_numpys_and_of_subsets_follows_its_seed_alone() -> None:
    for num, dim in ((2, 3), (30, 1), (100, 64)):
        real, fake = normal(num, dim), normal(num, dim, seed=1)
        mean, std = kernel_distance(real, fake)
        assert mean == pytest.approx(unbiased_mmd(real, fake), rel=1e-9)
        assert std == pytest.approx(0, abs=1e-9 * abs(mean))
    real, fake, before = normal(90, 4), normal(50, 4, seed=1), torch.get_rng_state()
    mean, std = kernel_distance(real, fake, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(real, fake, seed=3) == (mean, std) != kernel_distance(real, fake, seed=1)
    assert std > 0
    assert mean == pytest.approx(unbiased_mmd(real, fake), abs=5 * std / 100**0.5)


def covered(centres: Tensor, points: Tensor) -> float:
    """Share of points that are no farther from some centre than its third nearest other centre is."""
    c, p = centres.double().numpy(), points.double().numpy()
    hit = np.zeros(len(p), dtype=bool)
    for i, centre in enumerate(c):
        others = np.sort(np.linalg.norm(np.delete(c, i, axis=0) - centre, axis=1))
        hit |= np.linalg.norm(p - centre, axis=1) <= others[2]
    return float(hit.mean())


def test_precision_and_recall_are_numpys(features: Tensor) -> None:
    drawn = [
        (normal(real, dim), normal(fake, dim, seed=1)) for real, fake, dim in ((4, 4, 2), (60, 90, 2), (50, 200, 64))
    ]
    for real, fake in (*drawn, (features[:200], 1.1 * features[200:])):
        assert precision_recall(real, fake) == pytest.approx((covered(real, fake), covered(fake, real)), abs=1e-6)
        assert precision_recall(real, real) == (1, 1)
        assert precision_recall(real, real + 1000) == (0, 0)
