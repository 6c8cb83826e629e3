"""Distances between sets of images, by their features: Fréchet distance, kernel distance, precision and recall."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.data import DataError
from jacobiflow.evaluation.fashion import STATISTICS
from jacobiflow.evaluation.features import InceptionFeatures, load_tensors, need_torchmetrics
from jacobiflow.files import write_atomically

_NEIGHBOURS = 3
LEAST = _NEIGHBOURS + 1  # images for precision and recall
_SUBSETS, _SUBSET = 100, 1000


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the features of a set: `num` of them, `sum` (d,) and `outer` (d, d), that of f f^T; float64.

    They are the state of torchmetrics' `FrechetInceptionDistance`, and files of them are state dicts of it, as the
    original TarFlow code writes and reads.
    """

    num: int
    sum: Float[Tensor, " d"]
    outer: Float[Tensor, "d d"]

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> Statistics:
        """The statistics of features (N, d)."""
        metric = _metric(features.shape[1])
        metric.update(features, real=True)
        return cls(
            int(metric.real_features_num_samples),
            metric.real_features_sum.clone(),
            metric.real_features_cov_sum.clone(),
        )

    def covariance(self) -> Float[Tensor, "d d"]:
        """The covariance of the features, with n - 1 in its denominator."""
        mean = self.sum / self.num
        return (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Those of the real images in a file: a state dict of `FrechetInceptionDistance`, such as `*_fid_stats.pth`.

        **Raises** `DataError` where it is none.
        """
        mend = "a file by jacobiflow evaluate --save-stats, or of the original's *_fid_stats.pth"
        state = load_tensors(Path(path), mend)
        try:
            return cls._of_state(state)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{path}: no statistics of FrechetInceptionDistance ({reason}); give {mend}") from error

    @classmethod
    def bundled(cls) -> Statistics:
        """Those of the fashion features of Fashion-MNIST's 60,000 training images."""
        with resources.as_file(resources.files("jacobiflow.evaluation").joinpath(STATISTICS)) as path:
            return cls.load(path)

    @classmethod
    def _of_state(cls, state: Any) -> Statistics:
        if not isinstance(state, dict):
            raise TypeError(f"of type {type(state).__name__}")
        num, total, outer = (state[f"real_features_{name}"] for name in ("num_samples", "sum", "cov_sum"))
        if not (total.is_floating_point() and outer.is_floating_point() and not num.is_floating_point()):
            raise TypeError(f"of types {total.dtype}, {outer.dtype}, {num.dtype}")
        if total.ndim != 1 or not len(total) or outer.shape != (len(total), len(total)) or int(num) < 2:
            raise ValueError(f"shapes {tuple(total.shape)} and {tuple(outer.shape)}, of {int(num)} images")
        if not (torch.isfinite(total).all() and torch.isfinite(outer).all()):
            raise ValueError("a NaN or an infinity")
        if not torch.allclose(outer, outer.T):
            raise ValueError("covariances that are not symmetric")
        return cls(int(num), total.double(), outer.double())

    def save(self, path: str | Path, inception: InceptionFeatures | None = None) -> None:
        """Write a state dict of `FrechetInceptionDistance`, whole or not at all.

        With `inception` its weights are in it too: the original code loads such a file, and no other.

        **Raises** `DataError` where they are of fewer than 2 images, `OSError` where it cannot be written.
        """
        if self.num < 2:
            raise DataError(f"statistics of {self.num} images: give at least 2")
        state = {
            "real_features_sum": self.sum, "real_features_cov_sum": self.outer,
            "real_features_num_samples": torch.tensor(self.num),
            "fake_features_sum": torch.zeros_like(self.sum), "fake_features_cov_sum": torch.zeros_like(self.outer),
            "fake_features_num_samples": torch.tensor(0),
        }  # fmt: skip
        if inception is not None:
            state |= {f"inception.{name}": value.cpu() for name, value in inception.network.state_dict().items()}
        data = io.BytesIO()
        torch.save(state, data)
        write_atomically(path, data.getvalue())


def frechet_distance(real: Statistics, fake: Statistics) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), of means and covariances: FID where the features are Inception's.

    Computed by torchmetrics, in float64. **Raises** `DataError` where the features' numbers differ, a set has fewer
    than 2, or means or covariances are not finite.

    Reference: Heusel et al., arXiv 1706.08500.
    """
    if len(real.sum) != len(fake.sum):
        raise DataError(
            f"statistics of {len(real.sum)} features against {len(fake.sum)}: give statistics of the same features"
        )
    if min(real.num, fake.num) < 2:
        raise DataError(f"a Fréchet distance between {real.num} and {fake.num} images: give at least 2 of each")
    first, second = real.covariance(), fake.covariance()
    if not torch.isfinite(torch.stack((first, second, first @ second))).all():  # LAPACK would corrupt memory
        raise DataError("a Fréchet distance between features that are not finite, or overflow: check the images")
    metric = _metric(len(real.sum))
    for name, side in (("real", real), ("fake", fake)):
        setattr(metric, f"{name}_features_sum", side.sum)
        setattr(metric, f"{name}_features_cov_sum", side.outer)
        setattr(metric, f"{name}_features_num_samples", torch.tensor(side.num))
    metric.orig_dtype = torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the states were not made by `update`
        return float(metric.compute())


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of random subsets, mean and standard deviation over 100 of them: KID.

    By torchmetrics. Subsets are of 1,000, or of the smaller set's size. **Raises** `DataError` where a set has fewer
    than 2, their numbers of features differ, or one is not finite.

    Reference: Binkowski et al., arXiv 1801.01401.
    """
    need_torchmetrics("the kernel distance")
    _check(real, fake, 2)
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # that it keeps all features
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            _AsTheyAre(real.shape[1]),
            subsets=_SUBSETS,
            subset_size=min(_SUBSET, len(real), len(fake)),
            sync_on_compute=False,
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_recall(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> tuple[float, float]:
    """Share of the fake within a real one's distance to its third neighbour, and of the real within a fake one's.

    By torch-fidelity. Both depend on how many there are of each. **Raises** `DataError` where a set has fewer than 4,
    their numbers of features differ, or one is not finite.

    Reference: Kynkäänniemi et al., arXiv 1904.06991.
    """
    need_torchmetrics("precision and recall")
    _check(real, fake, LEAST)
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        fake.double(), real.double(), prc_neighborhood=_NEIGHBOURS, prc_batch_size=10_000, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    return float(found["precision"]), float(found["recall"])


def _check(real: Tensor, fake: Tensor, least: int) -> None:
    if real.shape[1] != fake.shape[1]:
        raise DataError(f"{real.shape[1]} features against {fake.shape[1]}: give the same features of both sets")
    if min(len(real), len(fake)) < least:
        raise DataError(f"{len(real)} images against {len(fake)}: give at least {least} of each")
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise DataError("features that are not finite: check the images")


class _AsTheyAre(nn.Module):
    """Hands features that are there already to a metric of torchmetrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(num_features: int) -> Any:
    need_torchmetrics("the Fréchet distance")
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Under torchrun it would add up what every process has.
    return FrechetInceptionDistance(_AsTheyAre(num_features), sync_on_compute=False)
