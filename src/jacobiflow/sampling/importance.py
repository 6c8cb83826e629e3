"""Importance weights of samples under a target density that is known up to a constant."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.errors import InputValueError
from jacobiflow.sampling.folder import SampleFolder
from jacobiflow.sampling.result import Samples
from jacobiflow.utils.checks import check_count, check_floating, check_kind, check_number, check_rows, check_seed


@dataclass(frozen=True)
class ImportanceWeights:
    """Importance weights w = exp(-energy) / q of samples from a density q.

    Attributes:
        log_weights: log w of each sample, up to the constant of the target; -infinity for a weight of 0.

    Raises:
        ValueError: If a log-weight is NaN or infinity, or if all are -infinity.

    Example:
        >>> weights = jf.ImportanceWeights(torch.tensor([0.0, 0.0, -1.0e9]))
        >>> weights
        importance weights of 3 samples, worth 2.0 samples of the target
        >>> values = torch.tensor([0.0, 4.0, 99.0])
        >>> weights.mean(values).item(), weights.standard_error(values).item()
        (2.0, 1.4142135381698608)
    """

    log_weights: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        check_floating("log_weights", self.log_weights, ("N",))
        if num := int((self.log_weights.isnan() | (self.log_weights == inf)).sum()):
            raise InputValueError(f"log_weights: {num} are NaN or infinity; give finite values, or -infinity")
        if not self.log_weights.isfinite().any():
            raise InputValueError("log_weights: all are -infinity, so no sample has a weight; check the energies")

    @property
    def normalized(self) -> Float[Tensor, " n"]:
        """The weights over their sum."""
        return self.log_weights.softmax(dim=0)

    @property
    def effective_sample_size(self) -> float:
        """Kish's (sum w)^2 / sum w^2, between 1 and the number of samples."""
        return float(1 / self.normalized.square().sum())

    def mean(self, values: Float[Tensor, n * d]) -> Float[Tensor, "*d"]:
        """Returns the self-normalised estimate sum(w values) / sum(w) of the target's mean.

        A sample of weight 0 does not count, even if its value is infinite or NaN.
        """
        return torch.tensordot(*self._weighted(values), dims=1)

    def standard_error(self, values: Float[Tensor, n * d]) -> Float[Tensor, "*d"]:
        """Returns the standard error of `mean(values)`: the root of sum(v^2 (values - mean)^2), v = w / sum(w).

        It is too small if the samples miss a part of the target. Source: A. Owen, Monte Carlo theory, methods and
        examples, section 9.2.
        """
        weights, values = self._weighted(values)
        differences = values - torch.tensordot(weights, values, dims=1)
        return torch.tensordot(weights.abs().square(), differences.abs().square(), dims=1).sqrt()

    def _weighted(self, values: Float[Tensor, n * d]) -> tuple[Float[Tensor, " k"], Float[Tensor, k * d]]:
        """Returns the weights over their sum that are not 0, and the values of these samples."""
        check_rows("values", values, len(self.log_weights), "samples")
        dtype = values.dtype if values.is_floating_point() or values.is_complex() else self.log_weights.dtype
        values, weights = values.to(dtype), self.normalized.to(dtype)
        has_weight = weights != 0
        return weights[has_weight], values[has_weight]

    def resample(self, num: int, seed: int = 0) -> Int[Tensor, " k"]:
        """Returns the indices of `num` samples, drawn with replacement in proportion to the weights."""
        num, generator = check_count("num", num), torch.Generator().manual_seed(check_seed(seed))
        bounds = self.normalized.double().cumsum(dim=0).cpu()  # `multinomial` takes at most 2^24 of them
        draws = torch.rand(num, generator=generator, dtype=torch.float64, device="cpu") * bounds[-1]
        return torch.searchsorted(bounds, draws, right=True).clamp(max=len(bounds) - 1)

    def __repr__(self) -> str:
        num, size = len(self.log_weights), self.effective_sample_size
        return f"importance weights of {num:,} samples, worth {size:,.{size < 100:d}f} samples of the target"


def importance(
    samples: Samples | SampleFolder | str | Path, energy: Float[Tensor, " n"] | np.ndarray, *, clip: float = 0.0
) -> ImportanceWeights:
    """Returns the importance weights exp(-energy) / q of samples with densities q.

    It warns if the effective sample size is below 1% of the samples, or below both 10% of them and 10, as with energies
    in a wrong unit.

    Args:
        samples: Of `sample`, or a folder of them or its path, with densities. Each must be exact or certified, since
            the weight of a sample that is not from q is wrong.
        energy: -log of the target density of each sample, up to a constant: U / kT, as a tensor or array (n,).
        clip: The share of samples, those of the largest weights, that get the largest weight of the others.

    Raises:
        ValueError: If a sample is above the tolerance, not finite, approximate, known to be sensitive to rounding, or
            without a density, or if an energy is NaN or -infinity.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> flow = jf.TarFlow(jf.TokenConfig(4, 3, 64, num_blocks=2, layers_per_block=1))
        >>> samples = jf.sample(flow, 1000)  # The flow is untrained, so q is near N(0, I).
        >>> energy = (samples.tokens - 0.1).square().sum(dim=(1, 2)) / 2
        >>> weights = jf.importance(samples, energy)
        >>> weights.effective_sample_size > 500, weights.mean(samples.tokens).shape
        (True, torch.Size([4, 3]))
    """
    if isinstance(samples, str | Path):
        samples = SampleFolder.open(samples)
    check_kind("samples", samples, Samples | SampleFolder, "what jacobiflow.sample returns, or a folder of samples")
    energy = torch.as_tensor(energy, device="cpu") if isinstance(energy, np.ndarray) else energy
    if isinstance(samples, Samples):
        log_prob, outcome = samples.log_prob, samples.outcome
    else:
        log_prob, outcome = samples.log_prob(), samples.outcome()
    if log_prob is None:
        raise InputValueError("samples without densities: draw them with log_prob=True and settings=None")
    is_unchecked = outcome.residual is None and not outcome.is_exact
    if outcome.has_shortfall or is_unchecked:
        raise InputValueError(f"no weights for samples that are not from the flow's density: {outcome}")
    check_floating("energy", energy, (len(log_prob),))
    if num := int((energy.isnan() | (energy == -inf)).sum()):
        raise InputValueError(f"energy: {num} are NaN or -infinity; give infinity for a weight of 0")
    log_weights = -energy.detach().double() - log_prob.detach().to(energy.device).double()
    share = check_number("clip", clip, expected="a share of samples, from 0 to below 1", below=1)
    if count := min(round(share * len(log_weights)), len(log_weights) - 1):
        log_weights = log_weights.clamp(max=log_weights.topk(count + 1).values[-1])
    weights = ImportanceWeights(log_weights)
    num = len(log_weights)
    if weights.effective_sample_size < max(0.01 * num, min(0.1 * num, 10)):
        warnings.warn(
            f"{weights}: a few of them decide every average; check that the energy is -log of the target density, such "
            "as U / kT, at the coordinates and in the units of the flow", stacklevel=2,
        )  # fmt: skip
    return weights
