"""Importance weights of samples under a target density that is known up to a constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_count, check_floating, check_kind, check_number, check_seed
from jacobiflow.errors import InputValueError
from jacobiflow.sampling import Samples
from jacobiflow.storage import SampleFolder


@dataclass(frozen=True)
class Weights:
    """Importance weights w = exp(-energy) / q of samples from a density q.

    Attributes:
        log_weights: log w of each sample, up to the constant of the target.

    Example:
        >>> weights = jf.Weights(torch.tensor([0.0, 0.0, -1.0e9]))
        >>> weights.effective_sample_size, weights.mean(torch.tensor([1.0, 3.0, 99.0])).item()
        (2.0, 2.0)
    """

    log_weights: Float[Tensor, " n"]

    @property
    def normalized(self) -> Float[Tensor, " n"]:
        """The weights over their sum."""
        return self.log_weights.softmax(dim=0)

    @property
    def effective_sample_size(self) -> float:
        """Kish's (sum w)^2 / sum w^2, between 1 and the number of samples."""
        return float(1 / self.normalized.square().sum())

    def mean(self, values: Float[Tensor, n * d]) -> Float[Tensor, "*d"]:
        """Returns the self-normalised estimate sum(w values) / sum(w) of the target's mean."""
        check_kind("values", values, Tensor, "a tensor with a row for each sample")
        if not len(values) == len(self.log_weights):
            raise InputValueError(f"values: {len(values)} rows, but there are {len(self.log_weights)} samples")
        return torch.tensordot(self.normalized.to(values.dtype), values, dims=1)

    def resample(self, num: int, seed: int = 0) -> Int[Tensor, " k"]:
        """Returns the indices of `num` samples, drawn with replacement in proportion to the weights."""
        num, generator = check_count("num", num), torch.Generator().manual_seed(check_seed(seed))
        bounds = self.normalized.double().cumsum(dim=0).cpu()  # `multinomial` takes at most 2^24 of them
        draws = torch.rand(num, generator=generator, dtype=torch.float64) * bounds[-1]
        return torch.searchsorted(bounds, draws, right=True).clamp(max=len(bounds) - 1)


def importance(samples: Samples | SampleFolder, energy: Float[Tensor, " n"], *, clip: float = 0.0) -> Weights:
    """Returns the importance weights exp(-energy) / q of samples with densities q.

    Args:
        samples: Of `sample`, or a folder of them, with densities. Each must be exact or certified, since the weight of
            a sample that is not from q is wrong.
        energy: -log of the target density of each sample, up to a constant: U / kT.
        clip: The share of samples, those of the largest weights, that get the largest weight of the others.

    Raises:
        ValueError: If samples are lost, not certified, or without a density, or if an energy is NaN.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> flow = jf.TarFlow(jf.TokenConfig(4, 3, 64, num_blocks=2, layers_per_block=1))
        >>> samples = jf.sample(flow, 1000)  # of an untrained flow: q is near N(0, I)
        >>> energy = (samples.tokens - 0.1).square().sum(dim=(1, 2)) / 2
        >>> weights = jf.importance(samples, energy)
        >>> weights.effective_sample_size > 500, weights.mean(samples.tokens).shape
        (True, torch.Size([4, 3]))
    """
    check_kind("samples", samples, Samples | SampleFolder, "what jacobiflow.sample or sample_to_folder returns")
    if isinstance(samples, Samples):
        log_prob, outcome = samples.log_prob, samples.outcome
    else:
        log_prob, outcome = samples.log_prob(), samples.outcome()
    if log_prob is None:
        raise InputValueError("samples without densities: draw them with log_prob=True and settings=None")
    is_certified = outcome.exact or (outcome.tolerance is not None and outcome.residual is not None)
    if outcome.lost or not is_certified:
        raise InputValueError(f"no weights for samples that are not from the flow's density: {outcome}")
    check_floating("energy", energy, (len(log_prob),))
    if energy.isnan().any():
        raise InputValueError(f"energy: {int(energy.isnan().sum())} are NaN; an infinite one gives a weight of 0")
    log_weights = -energy.detach().double() - log_prob.detach().to(energy.device).double()
    if not log_weights.isfinite().any():
        raise InputValueError("energy: all are infinite, so that no sample has a weight")
    share = check_number("clip", clip, give="a share of samples, from 0 to below 1")
    if share >= 1:
        raise InputValueError(f"clip={clip}: give a share of samples, from 0 to below 1")
    if count := int(share * len(log_weights)):
        log_weights = log_weights.clamp(max=log_weights.topk(count + 1).values[-1])
    return Weights(log_weights)
