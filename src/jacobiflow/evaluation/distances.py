"""Distances between sets of images by their features, and errors against the exact images of the same latents."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jacobiflow.data import DataError, quantize
from jacobiflow.errors import InputValueError
from jacobiflow.evaluation.features import InceptionFeatures, load_tensors, need_extra
from jacobiflow.utils.checks import check_count, check_floating
from jacobiflow.utils.files import write_atomically
from jacobiflow.utils.timing import paired_error

_ROUNDING = 1e-6  # largest relative rounding error of sums that may have been formed in float32
_NEIGHBOURS = 3
SMALLEST = _NEIGHBOURS + 1  # number of images that precision and recall need on either side
_EXPECTED = "a file that Statistics.save wrote, or a *_fid_stats.pth of the original TarFlow code"


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sums over features of images that determine a Fréchet distance.

    They are the state of torchmetrics' `FrechetInceptionDistance`. Their files are its state dicts, which the original
    TarFlow code reads and writes too.

    Args:
        num: The number of images.
        sum: The sum of the features f, in float64.
        outer: The sum of f f^T, in float64.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> Statistics.of(features).covariance().tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """

    num: int
    sum: Float[Tensor, " d"]
    outer: Float[Tensor, "d d"]

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> Statistics:
        """Computes the statistics of features (N, d)."""
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    def covariance(self) -> Float[Tensor, "d d"]:
        """Returns the covariance of the features, with n - 1 in its denominator."""
        mean = self.sum / self.num
        return (self.outer - self.num * torch.outer(mean, mean)) / (self.num - 1)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads the statistics of the real images from a state dict of `FrechetInceptionDistance`.

        Raises:
            DataError: If the file is another, or its values are not those of any images.
        """
        state = load_tensors(Path(path), _EXPECTED)
        try:
            num, total, outer = (state[f"real_features_{name}"] for name in ("num_samples", "sum", "cov_sum"))
            check_floating("sum", total, ("d",))
            check_floating("cov_sum", outer, (len(total), len(total)))
            statistics = cls(check_count("num_samples", int(num), least=2), total.double(), outer.double())
            statistics._check_covariance()
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: no statistics of FrechetInceptionDistance ({error}); give {_EXPECTED}") from error
        return statistics

    def _check_covariance(self) -> None:
        """Raises ValueError if the covariance is not one of float32 features."""
        covariance = self.covariance()
        if not covariance.float().isfinite().all():
            raise InputValueError("the covariance is beyond the range of float32")
        if (self.outer - self.outer.T).abs().max() > _ROUNDING * self.outer.abs().max():
            raise InputValueError("cov_sum is not symmetric")
        if torch.linalg.eigvalsh(covariance)[0] * self.num < -_ROUNDING * self.outer.trace():
            raise InputValueError("the covariance has a negative eigenvalue")

    def save(self, path: str | Path, inception: InceptionFeatures | None = None) -> None:
        """Writes a state dict of `FrechetInceptionDistance`; the original code needs Inception's weights in it too."""
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
    """Computes the Fréchet distance |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), which is FID for Inception's features.

    Reference: Heusel et al., arXiv 1706.08500.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
        >>> real, fake = Statistics.of(features), Statistics.of(features + 2)
        >>> round(frechet_distance(real, fake), 6)
        8.0
    """
    if len(real.sum) != len(fake.sum):
        raise DataError(f"statistics of {len(real.sum)} features against {len(fake.sum)}: give the same features")
    if min(real.num, fake.num) < 2:
        raise DataError(f"a Fréchet distance between {real.num} and {fake.num} images: give at least 2 of each")
    means, first, second = real.sum / real.num - fake.sum / fake.num, real.covariance(), fake.covariance()
    product = first @ second
    if not torch.isfinite(torch.stack((first, second, product))).all():  # LAPACK would corrupt memory
        raise DataError("a Fréchet distance between features that are not finite, or overflow: check the images")
    root = torch.linalg.eigvals(product).sqrt().real.sum()
    return float(means @ means + first.trace() + second.trace() - 2 * root)


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], seed: int = 0) -> tuple[float, float]:
    """Computes the squared maximum mean discrepancy by torch-fidelity, which is KID for Inception's features.

    It is the mean and the standard deviation over 100 random subsets, which `seed` fixes, of 1,000 images, or of as
    many as the smaller set has.

    Reference: Binkowski et al., arXiv 1801.01401.
    """
    _check("the kernel distance", real, fake, 2)
    from torch_fidelity.metric_kid import kid_features_to_metric

    distance = kid_features_to_metric(
        real.double(), fake.double(), kid_subsets=100, kid_subset_size=min(1000, len(real), len(fake)),
        rng_seed=seed, verbose=False,
    )  # fmt: skip
    return float(distance["kernel_inception_distance_mean"]), float(distance["kernel_inception_distance_std"])


def precision_recall(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> tuple[float, float]:
    """Computes precision and recall by torch-fidelity.

    Precision is the share of fakes that lie within some real image's distance to its third neighbour, recall the same
    with roles swapped. Both depend on the sizes of the sets.

    Reference: Kynkäänniemi et al., arXiv 1904.06991.
    """
    _check("precision and recall", real, fake, SMALLEST)
    from torch_fidelity.metric_prc import prc_features_to_metric

    shares = prc_features_to_metric(
        fake.double(), real.double(), prc_neighborhood=_NEIGHBOURS, prc_batch_size=10_000, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    return float(shares["precision"]), float(shares["recall"])


def _check(what: str, real: Tensor, fake: Tensor, least: int) -> None:
    need_extra(what)
    if real.shape[1] != fake.shape[1]:
        raise DataError(f"{real.shape[1]} features against {fake.shape[1]}: give the same features of both sets")
    if min(len(real), len(fake)) < least:
        raise DataError(f"{len(real)} images against {len(fake)}: give at least {least} of each")
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise DataError("features that are not finite: check the images")


@dataclass(frozen=True)
class PixelDifference:
    """Differences between two sets of 8-bit images.

    Attributes:
        share: The share of pixels that differ.
        levels: The largest difference.
    """

    share: float
    levels: int


@dataclass(frozen=True)
class Fidelity:
    """Errors of images against the exact ones of the same latents.

    Attributes:
        num: The number of images.
        max: The largest difference of an entry, in the images' units ([-1, 1], not clipped).
        rms: The root-mean-square difference of an entry.
        psnr: 20 log10(2 / rms) in dB; infinity if all are equal, minus infinity if one is not finite.
        pixels: The difference after rounding to 8 bits.
    """

    num: int
    max: float
    rms: float
    psnr: float
    pixels: PixelDifference


def fidelity(images: Float[Tensor, "n c h w"], exact: Float[Tensor, "n c h w"]) -> Fidelity:
    """Compares images with the exact ones; entries that are NaN in both count as equal.

    Example:
        >>> exact = torch.zeros(2, 1, 4, 4)
        >>> errors = fidelity(exact + 0.02, exact)
        >>> round(errors.psnr, 3), errors.pixels
        (40.0, PixelDifference(share=1.0, levels=2))
    """
    error = paired_error(images, exact)
    psnr = 20 * (math.log10(2) - math.log10(error.rms)) if error.rms else math.inf  # images span [-1, 1]
    return Fidelity(len(images), error.max, error.rms, psnr, pixel_difference(quantize(images), quantize(exact)))


def pixel_difference(images: UInt8[Tensor, "n c h w"], exact: UInt8[Tensor, "n c h w"]) -> PixelDifference:
    """Compares 8-bit images."""
    levels = (images.short() - exact.short()).abs()
    return PixelDifference(float(levels.ne(0).double().mean()), int(levels.max()))
