"""Distances between sets of features, against NumPy; files of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jacobiflow.data import DataError
from jacobiflow.evaluation import Statistics, frechet_distance, kernel_distance, precision_recall

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


@pytest.mark.parametrize(("num", "other", "dim"), [(9, 12, 1), (300, 200, 17), (2, 2, 3), (5, 100, 32), (100, 5, 32)])
def test_frechet_distance_is_numpys(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    # Eigenvalues that are 0 but for rounding have square roots near 1e-8 of the largest's.
    assert between(real, fake) == pytest.approx(frechet(real, fake), rel=1e-8 if min(num, other) > dim else 1e-6)
    assert between(fake, real) == pytest.approx(between(real, fake), rel=1e-6)
    assert between(real, real.flip(0)) == pytest.approx(0, abs=1e-5)
    v = torch.linspace(-2, 3, dim, dtype=torch.float64)
    assert between(real, real + v) == pytest.approx(float(v.square().sum()), rel=1e-6)


class Identity(nn.Module):
    num_features = 17

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_torchmetrics_agrees_and_reads_and_writes_the_statistics(tmp_path: Path) -> None:
    real, fake = normal(300, 17).float(), normal(200, 17, seed=1).float()
    metric = FrechetInceptionDistance(Identity())
    metric.persistent(True)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert between(real, fake) == pytest.approx(float(metric.compute()), rel=1e-4)  # which is float32
    torch.save(metric.state_dict(), tmp_path / "theirs.pth")
    for statistics in (Statistics.load(tmp_path / "theirs.pth"), Statistics.of(real)):
        statistics.save(tmp_path / "ours.pth")
        again = Statistics.load(str(tmp_path / "ours.pth"))
        assert again.num == 300
        torch.testing.assert_close(again.sum, real.double().sum(dim=0))
        torch.testing.assert_close(again.outer, real.double().T @ real.double())
        torch.testing.assert_close(again.covariance(), torch.cov(real.double().T))
        metric.reset()
        metric.load_state_dict(torch.load(tmp_path / "ours.pth"))
        assert (int(metric.real_features_num_samples), int(metric.fake_features_num_samples)) == (300, 0)


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


@pytest.mark.parametrize(("num", "other", "dim"), [(4, 4, 2), (60, 90, 2), (50, 200, 64)])
def test_precision_and_recall_are_numpys(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    assert precision_recall(real, fake) == pytest.approx((covered(real, fake), covered(fake, real)), abs=1e-6)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match=r"^statistics of 3 features against 4: give statistics of the same features$"):
        between(normal(9, 3), normal(9, 4))
    with pytest.raises(DataError, match="between 9 and 1 images: give at least 2 of each"):
        between(normal(9, 3), normal(1, 3))
    infinite, huge = normal(5, 4) / 0, Statistics(5, 1e200 * torch.ones(4).double(), torch.eye(4).double())
    for statistics in (Statistics.of(infinite), huge):
        with pytest.raises(DataError, match="not finite"):
            frechet_distance(statistics, statistics)
    for measure, least in ((kernel_distance, 2), (precision_recall, 4)):
        with pytest.raises(DataError, match=f"{least} images against {least - 1}: give at least {least} of each$"):
            measure(normal(least, 3), normal(least - 1, 3))
        with pytest.raises(DataError, match="3 features against 2"):
            measure(normal(9, 3), normal(9, 2))
        with pytest.raises(DataError, match="not finite"):
            measure(normal(5, 4), infinite)


@pytest.mark.parametrize("change", [{"sum": [1.0]}, {"sum": torch.full((3,), torch.nan)}, {"num_samples": 1}, None])
def test_a_broken_file_of_statistics_is_named(change: dict[str, Any] | None, tmp_path: Path) -> None:
    path, state = tmp_path / "stats.pth", {"num_samples": 9, "sum": torch.ones(3), "cov_sum": torch.eye(3)}
    torch.save({f"real_features_{name}": value for name, value in (state | (change or {})).items()}, path)
    if change is None:
        path.write_bytes(b"no statistics")
    with pytest.raises(DataError, match=rf"^{path}: no .*; give a file that Statistics\.save wrote, or a \*_fid_"):
        Statistics.load(path)
