"""Distances between sets of images by their features."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import DataError, InputValueError
from jacobiflow.evaluation.features import InceptionFeatures, load_tensors, require_eval_extra
from jacobiflow.utils.checks import check_count, check_floating
from jacobiflow.utils.files import write_atomically

_NUM_NEIGHBOURS = 3
_MAX_ROUNDING = 1e-6  # rounding of a covariance, as a share of the mean of f f^T
MIN_IMAGES = _NUM_NEIGHBOURS + 1  # number of images of each set that scores over pairs of images need
_EXPECTED_FILE = "a file that FeatureStatistics.save wrote, or a *_fid_stats.pth of the original TarFlow code"


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Sums over the features of images, which determine a Fréchet distance.

    Its files are state dicts of torchmetrics' `FrechetInceptionDistance`, which the original TarFlow code reads and
    writes too.

    Args:
        num: Number of images.
        sum: Sum of the features f, in float64.
        outer: Sum of f f^T, in float64.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> FeatureStatistics.from_features(features).covariance().tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """

    num: int
    sum: Float[Tensor, " d"]
    outer: Float[Tensor, "d d"]

    @classmethod
    def from_features(cls, features: Float[Tensor, "n d"]) -> FeatureStatistics:
        """Computes the statistics of features (N, d)."""
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    @classmethod
    def merge(cls, parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
        """Returns the statistics of all images, from those of parts of them."""
        return functools.reduce(lambda a, b: cls(a.num + b.num, a.sum + b.sum, a.outer + b.outer), parts)

    def covariance(self) -> Float[Tensor, "d d"]:
        """Returns the covariance of the features; its denominator is n - 1."""
        mean = self.sum / self.num
        return (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads the statistics of the real images from a state dict of `FrechetInceptionDistance`.

        Raises:
            DataError: If it is another file, or no images can have these values.
        """
        state = load_tensors(Path(path), _EXPECTED_FILE)
        try:
            num, total, outer = (state[f"real_features_{name}"] for name in ("num_samples", "sum", "cov_sum"))
            check_floating("sum", total, ("d",))
            check_floating("cov_sum", outer, (len(total), len(total)))
            statistics = cls(check_count("num_samples", int(num), minimum=2), total.double(), outer.double())
            variance = statistics.covariance().float().diagonal()
            if not variance.isfinite().all() or (variance < -_MAX_ROUNDING * outer.diagonal().max() / num).any():
                raise InputValueError("cov_sum gives a variance that is negative, or not finite")
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: no statistics of FrechetInceptionDistance ({error}); give {_EXPECTED_FILE}"
            ) from error
        return statistics

    def save(self, path: str | Path, inception: InceptionFeatures | None = None) -> None:
        """Writes a state dict of `FrechetInceptionDistance`; the original code also needs Inception's weights in it."""
        state = {
            "real_features_sum": self.sum, "real_features_cov_sum": self.outer,
            "real_features_num_samples": torch.tensor(self.num, device="cpu"),
            "fake_features_sum": torch.zeros_like(self.sum), "fake_features_cov_sum": torch.zeros_like(self.outer),
            "fake_features_num_samples": torch.tensor(0, device="cpu"),
        }  # fmt: skip
        if inception is not None:
            state |= {f"inception.{name}": value.cpu() for name, value in inception.network.state_dict().items()}
        data = io.BytesIO()
        torch.save(state, data)
        write_atomically(path, data.getvalue())


def frechet_distance(real: FeatureStatistics, fake: FeatureStatistics) -> float:
    """Computes the Fréchet distance |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), which is FID for Inception's features.

    Reference: Heusel et al., arXiv 1706.08500.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
        >>> real, fake = FeatureStatistics.from_features(features), FeatureStatistics.from_features(features + 2)
        >>> round(frechet_distance(real, fake), 6)
        8.0
    """
    check_comparable((real.num, len(real.sum)), (fake.num, len(fake.sum)))
    means, first, second = real.sum / real.num - fake.sum / fake.num, real.covariance(), fake.covariance()
    product = first @ second
    if not torch.isfinite(torch.stack((first, second, product))).all():  # LAPACK would corrupt memory
        raise DataError("a Fréchet distance between features that are not finite, or overflow: check the images")
    root = torch.linalg.eigvals(product).sqrt().real.sum()
    return float(means @ means + first.trace() + second.trace() - 2 * root)


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], seed: int = 0) -> tuple[float, float]:
    """Computes the squared maximum mean discrepancy by torch-fidelity, which is KID for Inception's features.

    Returns the mean and the standard deviation over 100 random subsets, which `seed` fixes. A subset has 1,000 images,
    or as many as the smaller set.

    Reference: Binkowski et al., arXiv 1801.01401.
    """
    _check_features("the kernel distance", real, fake)
    from torch_fidelity.metric_kid import kid_features_to_metric

    distance = kid_features_to_metric(
        real.double(), fake.double(), kid_subsets=100, kid_subset_size=min(1000, len(real), len(fake)),
        rng_seed=seed, verbose=False,
    )  # fmt: skip
    return float(distance["kernel_inception_distance_mean"]), float(distance["kernel_inception_distance_std"])


def precision_recall(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> tuple[float, float]:
    """Computes precision and recall by torch-fidelity.

    Precision is the share of fake images that are closer to some real image than that image's third neighbour. Recall
    is the same with the sets swapped. Both depend on the sizes of the sets.

    Reference: Kynkäänniemi et al., arXiv 1904.06991.
    """
    _check_features("precision and recall", real, fake)
    from torch_fidelity.metric_prc import prc_features_to_metric

    shares = prc_features_to_metric(
        fake.double(), real.double(), prc_neighborhood=_NUM_NEIGHBOURS, prc_batch_size=10_000, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    return float(shares["precision"]), float(shares["recall"])


def check_comparable(real: tuple[int, int], fake: tuple[int, int], min_images: int = 2) -> None:
    """Raises DataError if features of these shapes (n, d) cannot be compared."""
    if real[1] != fake[1]:
        raise DataError(f"{real[1]} features against {fake[1]}: give the same features of both sets")
    if min(real[0], fake[0]) < min_images:
        raise DataError(f"{real[0]} images against {fake[0]}: give at least {min_images} of each")


def _check_features(what: str, real: Tensor, fake: Tensor) -> None:
    require_eval_extra(what)
    check_comparable((len(real), real.shape[1]), (len(fake), fake.shape[1]), MIN_IMAGES)
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise DataError("features that are not finite: check the images")
