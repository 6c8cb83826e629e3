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

from jacobiflow.checks import check_choice, short
from jacobiflow.data import DataError
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.evaluation.convolutional import BUNDLED, statistics_file
from jacobiflow.evaluation.features import InceptionFeatures, load_tensors, need_torchmetrics
from jacobiflow.files import write_atomically

_NEIGHBOURS = 3
LEAST = _NEIGHBOURS + 1
"""The smallest set that precision and recall take."""

_SUBSETS, _SUBSET = 100, 1000
_ROUNDING = {torch.float64: 1e-8}  # of covariances, relative to their norm and the features' squares
_COARSE = 1e-6  # where the sums are in single or half precision
_EXPECTED = "a file that Statistics.save wrote, or a *_fid_stats.pth of the original TarFlow code"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the features f (d,) of `num` images: `sum` (d,) of f, and `outer` (d, d) of f f^T; float64.

    They are the state of torchmetrics' `FrechetInceptionDistance`. Their files are its state dicts, which the original
    TarFlow code writes and reads too.
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

        **Raises** `DataError` where the file is not one, or its sums cannot be those of a set.
        """
        state = load_tensors(Path(path), _EXPECTED)
        try:
            return cls._of_state(state)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            raise DataError(
                f"{path}: no statistics of FrechetInceptionDistance ({reason}); give {_EXPECTED}"
            ) from error

    @classmethod
    def bundled(cls, kind: str) -> Statistics:
        """Those of the features "fashion" or "emoji" of their training images; see `ConvolutionalFeatures`."""
        check_choice("kind", kind, tuple(BUNDLED))
        with resources.as_file(resources.files("jacobiflow.evaluation").joinpath(statistics_file(kind))) as path:
            return cls.load(path)

    @classmethod
    def _of_state(cls, state: Any) -> Statistics:
        if not isinstance(state, dict):
            raise InputTypeError(f"of type {type(state).__name__}")
        num, total, outer = (state[f"real_features_{name}"] for name in ("num_samples", "sum", "cov_sum"))
        if not (total.is_floating_point() and outer.is_floating_point() and not num.is_floating_point()):
            raise InputTypeError(f"of types {total.dtype}, {outer.dtype}, {num.dtype}")
        if num.dtype == torch.bool or num.numel() != 1:
            raise InputTypeError(f"a number of images {short(num)}")
        if total.ndim != 1 or not len(total) or outer.shape != (len(total), len(total)) or int(num) < 2:
            raise InputValueError(f"shapes {tuple(total.shape)} and {tuple(outer.shape)}, of {int(num)} images")
        found = cls(int(num), total.double(), outer.double())
        covariance = found.covariance()
        if not torch.isfinite(covariance).all():
            raise InputValueError("a NaN or an infinity")
        scale = float(found.outer.diagonal().abs().max()) / found.num + float(torch.linalg.matrix_norm(covariance))
        slack = _ROUNDING.get(outer.dtype, _COARSE) * scale
        if (covariance - covariance.T).abs().max() > slack:
            raise InputValueError("covariances that are not symmetric")
        # Where all features are 0 there is nothing to factorise.
        if slack and torch.linalg.cholesky_ex(covariance + slack * torch.eye(len(covariance)).double()).info:
            raise InputValueError("covariances with a negative eigenvalue")
        return found

    def save(self, path: str | Path, inception: InceptionFeatures | None = None) -> None:
        """Write a state dict of `FrechetInceptionDistance`, whole or not at all.

        With `inception` the file also has its weights: the original code loads no file without them.

        **Raises** `DataError` for fewer than 2 images, `OSError` where the file cannot be written.
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

    Computed by torchmetrics, in float64. **Raises** `DataError` where the numbers of features differ, a set has fewer
    than 2 images, or means or covariances are not finite.

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
        warnings.simplefilter("ignore")  # the warning that `update` was not called
        return float(metric.compute())


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of random subsets, mean and standard deviation over 100 of them: KID.

    Computed by torchmetrics. Subsets have 1,000 images, or as many as the smaller set. **Raises** `DataError` where a
    set has fewer than 2, the numbers of features differ, or a feature is not finite.

    Reference: Binkowski et al., arXiv 1801.01401.
    """
    need_torchmetrics("the kernel distance")
    _check(real, fake, 2)
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # the warning that it keeps all features
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            _Identity(real.shape[1]),
            subsets=_SUBSETS,
            subset_size=min(_SUBSET, len(real), len(fake)),
            sync_on_compute=False,
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_recall(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> tuple[float, float]:
    """Share of fakes that lie within some real one's distance to its third neighbour, and the same with roles swapped.

    Computed by torch-fidelity. Both depend on the sizes of the sets. **Raises** `DataError` where a set has fewer than
    4 images, the numbers of features differ, or a feature is not finite.

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


class _Identity(nn.Module):
    """Stands in for torchmetrics' network: the features are at hand already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(num_features: int) -> Any:
    need_torchmetrics("the Fréchet distance")
    from torchmetrics.image.fid import FrechetInceptionDistance

    # By default it would add up the statistics of all processes under torchrun.
    return FrechetInceptionDistance(_Identity(num_features), sync_on_compute=False)
