"""Distances between sets of features, against NumPy; files of statistics."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jacobiflow.data import DataError
from jacobiflow.evaluation import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from tests.helpers import scoring

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("torchmetrics") is None, reason="needs jacobiflow[eval]"),
]

NAN = math.nan


def normal(num: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def between(real: Tensor, fake: Tensor) -> float:
    return frechet_distance(FeatureStatistics.from_features(real), FeatureStatistics.from_features(fake))


@pytest.mark.parametrize(("num", "other", "dim"), [(300, 200, 17), (5, 100, 32)])
def test_frechet_distance_is_numpys(num: int, other: int, dim: int) -> None:
    """Covariances may be singular."""
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    expected = scoring.frechet(scoring.moments(real.numpy()), scoring.moments(fake.numpy()))
    assert between(real, fake) == pytest.approx(expected, rel=1e-6)
    assert between(real, real.flip(0)) == pytest.approx(0, abs=1e-5)


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    """The covariance of few images is singular, but for rounding."""
    singular = FeatureStatistics.from_features(1000 + normal(5, 32).float())
    singular.save(tmp_path / "stats.pth")
    back = FeatureStatistics.load(str(tmp_path / "stats.pth"))
    assert (back.num, back.sum.tolist(), back.outer.tolist()) == (5, singular.sum.tolist(), singular.outer.tolist())


def test_kernel_distance_is_numpys_and_follows_its_seed() -> None:
    """It is the unbiased estimate for the kernel (x . y / d + 1)^3: a mean over pairs of different elements."""
    real, fake = normal(100, 64), normal(100, 64, seed=1)
    xx, yy, xy = ((a @ b.T / 64 + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake)))
    within = sum(float(k[~torch.eye(100, dtype=torch.bool)].mean()) for k in (xx, yy))
    assert kernel_distance(real, fake)[0] == pytest.approx(within - 2 * float(xy.mean()), rel=1e-9)
    real = normal(90, 64)
    mean, std = kernel_distance(real, fake, seed=3)
    assert kernel_distance(real, fake, seed=3) == (mean, std) != kernel_distance(real, fake, seed=1)
    assert std > 0


def covered(centres: Tensor, points: Tensor) -> float:
    """Returns the share of points that are closer to some centre than its third neighbour."""
    reach = torch.cdist(centres, centres).sort(dim=1).values[:, 3]
    return float((torch.cdist(centres, points) <= reach[:, None]).any(dim=0).double().mean())


def test_precision_and_recall_are_shares_of_covered_images() -> None:
    real, fake = normal(60, 2), normal(90, 2, seed=1)
    assert precision_recall(real, fake) == pytest.approx((covered(real, fake), covered(fake, real)), abs=1e-6)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match=r"^3 features against 4: give the same features of both sets$"):
        between(normal(9, 3), normal(9, 4))
    with pytest.raises(DataError, match=r"^9 images against 1: give at least 2 of each"):
        between(normal(9, 3), normal(1, 3))
    infinite, huge = normal(5, 4) / 0, FeatureStatistics(5, 1e200 * torch.ones(4).double(), torch.eye(4).double())
    for statistics in (FeatureStatistics.from_features(infinite), huge):
        with pytest.raises(DataError, match="not finite"):
            frechet_distance(statistics, statistics)
    for measure in (kernel_distance, precision_recall):
        with pytest.raises(DataError, match=r"^4 images against 3: give at least 4 of each$"):
            measure(normal(4, 3), normal(3, 3))
        with pytest.raises(DataError, match="3 features against 2"):
            measure(normal(9, 3), normal(9, 2))
        with pytest.raises(DataError, match="not finite"):
            measure(normal(5, 4), infinite)


@pytest.mark.parametrize(
    "state",
    [
        {"sum": [1.0]}, {}, None, {"sum": torch.ones(2)}, {"sum": torch.tensor(1.0)},
        *({"sum": torch.zeros(3), "num_samples": num} for num in (1, NAN)),
        *({"sum": torch.zeros(3), "cov_sum": bad} for bad in (
            1e300 * torch.eye(3).double(), NAN * torch.eye(3), torch.eye(3).to_sparse(), torch.eye(2), -torch.eye(3),
        )),
    ],
)  # fmt: skip
def test_a_broken_file_of_statistics_is_named(state: dict[str, Any] | None, tmp_path: Path) -> None:
    path, rest = tmp_path / "stats.pth", {"num_samples": 9, "cov_sum": torch.eye(3)}
    torch.save({f"real_features_{name}": value for name, value in (rest | (state or {})).items()}, path)
    if state is None:
        path.write_bytes(b"no statistics")
    with pytest.raises(DataError, match=rf"^{path}: no .*; give a file that FeatureStatistics\.save wrote"):
        FeatureStatistics.load(path)
