"""A guess that is linear in the latents before each token, fitted to a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import check_finite, check_floating
from jacobiflow.codec import register
from jacobiflow.solvers.convolution import (
    FIT_WIDTH,
    StackedKernel,
    as_kernel,
    causal_convolution,
    check_kernel,
    rows_before,
)
from jacobiflow.solvers.guess import Guess, check_shape

_RIDGE = 1e-3  # of the latents' variance


@register("causal_linear")
@dataclass(frozen=True, eq=False, repr=False)
class CausalLinear(Guess):
    """X^(0)_t = shift_t + sum over d = 0..w-1 of kernel[d] Z_(t-d): a linear autoregressive guess.

    The least-squares estimate of the solution from the latents of a token and of those before it, one kernel for all
    positions: `jacobiflow.calibrate` fits it. Sweeps from `MeanAffine` would find most of it first.

    **Arguments:** `kernel` (w, C, C), `shift` (T, C). **Raises** `TypeError` where one is no tensor of
    floating-point numbers, `ValueError` where they are not finite, or do not fit each other or Z.
    """

    kernel: Float[Tensor, "w c c"]
    shift: Float[Tensor, "t c"]

    def __post_init__(self) -> None:
        check_kernel("CausalLinear", self.kernel)
        check_floating("CausalLinear: shift", self.shift, ("tokens", self.kernel.shape[1]))
        check_finite("CausalLinear: shift", self.shift)

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        self.check(*z.shape[1:])
        return causal_convolution(z, self._stacked, add=self.shift.to(z).expand_as(z))

    def check(self, num_tokens: int, token_channels: int) -> None:
        check_shape(self, self.shift, num_tokens, token_channels)

    @classmethod
    def fit(cls, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], width: int = FIT_WIDTH) -> CausalLinear:
        """The guess from `width` + 1 latents that comes nearest to the solutions `x` at `z`, by ridge regression."""
        rows = rows_before(z - z.mean(dim=0), width + 1)
        gram = rows.T @ rows
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        centred = (x - x.mean(dim=0)).flatten(0, 1).to(rows)
        kernel = as_kernel(torch.linalg.solve(gram + ridge, rows.T @ centred), width + 1).to(x)
        linear = cls(kernel, torch.zeros_like(x[0]))
        return cls(kernel.cpu(), (x - linear(z)).mean(dim=0).cpu())

    @cached_property
    def _stacked(self) -> StackedKernel:
        return StackedKernel(self.kernel)

    def __repr__(self) -> str:
        tokens, channels = self.shift.shape
        return f"CausalLinear({tokens} tokens, {channels} channels, from {len(self.kernel)} latents)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CausalLinear):
            return NotImplemented
        return torch.equal(self.kernel, other.kernel) and torch.equal(self.shift, other.shift)

    def __hash__(self) -> int:
        return hash(tuple(self.shift.flatten().tolist()))
