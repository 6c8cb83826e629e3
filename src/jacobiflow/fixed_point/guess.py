"""Guesses: the start of an iteration."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.convolution import (
    FIT_WIDTH,
    Convolution,
    TensorFields,
    as_kernel,
    check_values,
    rows_before,
)
from jacobiflow.fixed_point.correction import Correction
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import Piece, register_piece
from jacobiflow.utils.checks import check_floating

_RIDGE = 1e-3
"""The ridge penalty, relative to the variance of the latents."""


class Start(NamedTuple):
    """The start of an iteration, and the cost of the sweeps that led to it.

    Attributes:
        x: X^(0).
        sample_sweeps: Sweeps of each sample.
        sweeps: Sweeps of all batches.
        token_evaluations: Tokens times samples over these sweeps.
    """

    x: Tokens
    sample_sweeps: int | Tensor = 0
    sweeps: int = 0
    token_evaluations: int = 0


class Guess(Piece):
    """Chooses X^(0), as a rule from the block's input.

    Example:
        >>> class Ones(jf.Guess):
        ...     def __call__(self, z):
        ...         return torch.ones_like(z)
        >>> solver = jf.Solver(jf.Whole(), Ones())
    """

    @abstractmethod
    def __call__(self, z: Tokens) -> Tokens:
        """Returns X^(0)."""

    def start(self, problem: Problem, correction: Correction, options: SolveOptions) -> Start:
        """Returns X^(0) for a problem, of which a guess may also use the block."""
        return Start(self(problem.z))

    def check(self, num_tokens: int, token_dim: int) -> None:
        """Raises ValueError if the guess does not fit tokens (T, C)."""

    @classmethod
    def fit(cls, x: Tokens, z: Tokens) -> Guess | None:
        """Returns the one for `jacobiflow.tune` to try on a block with solutions `x` at `z`, if it can be fitted."""
        return None


@register_piece("latent")
@dataclass(frozen=True)
class Latent(Guess):
    """X^(0) = Z, the block's input: neighbouring blocks change an image little (section 3.2 of the paper).

    Example:
        >>> jf.Latent()(torch.ones(1, 2, 1)).flatten()
        tensor([1., 1.])
    """

    def __call__(self, z: Tokens) -> Tokens:
        return z


@register_piece("zeros")
@dataclass(frozen=True)
class Zeros(Guess):
    """X^(0) = [z_1, 0, ..., 0], for blocks in which Z overflows (section 3.2 of the paper).

    Example:
        >>> jf.Zeros()(torch.ones(1, 2, 1)).flatten()
        tensor([1., 0.])
    """

    def __call__(self, z: Tokens) -> Tokens:
        x = torch.zeros_like(z)
        x[:, :1] = z[:, :1]
        return x


class _ShiftedGuess(TensorFields, Guess):
    """Base of guesses with a `shift` (T, C)."""

    shift: Tensor

    def check(self, num_tokens: int, token_dim: int) -> None:
        if self.shift.shape != (num_tokens, token_dim):
            raise InputValueError(f"{self!r}, but the tokens are {(num_tokens, token_dim)}: calibrate this flow")


@register_piece("mean_affine")
@dataclass(frozen=True, eq=False, repr=False)
class MeanAffine(_ShiftedGuess):
    """X^(0) = exp(log_scale) Z + shift: the mean parameters of the block over calibration images, (T, C) each.

    `jacobiflow.calibrate` measures the means.

    Example:
        >>> jf.MeanAffine(torch.zeros(2, 1), torch.ones(2, 1))(torch.ones(1, 2, 1)).flatten()
        tensor([2., 2.])
    """

    log_scale: Float[Tensor, "t c"]
    shift: Float[Tensor, "t c"]

    def __post_init__(self) -> None:
        check_values("MeanAffine: log_scale", self.log_scale, ("tokens", "token_dim"))
        check_values("MeanAffine: shift", self.shift, tuple(self.log_scale.shape))

    def __call__(self, z: Tokens) -> Tokens:
        return torch.addcmul(self.shift.to(z), self.log_scale.to(z).exp(), z)


@register_piece("causal_linear")
@dataclass(frozen=True, eq=False, repr=False)
class CausalLinear(Convolution, _ShiftedGuess):
    """X^(0)_t = shift_t + sum over d = 0..w-1 of kernel[d] Z_(t-d): a linear autoregressive guess.

    The least-squares estimate of the solution, with one kernel for all positions.

    Example:
        >>> jf.CausalLinear(torch.ones(2, 1, 1), torch.zeros(3, 1))(torch.ones(1, 3, 1)).flatten()
        tensor([1., 2., 2.])
    """

    kernel: Float[Tensor, "w c c"]
    shift: Float[Tensor, "t c"]

    def __post_init__(self) -> None:
        self.check_kernel()
        check_values("CausalLinear: shift", self.shift, ("tokens", self.kernel.shape[1]))

    def __call__(self, z: Tokens) -> Tokens:
        return self.convolve(z, add=self.shift.to(z).expand_as(z))

    @classmethod
    def fit(cls, x: Tokens, z: Tokens, width: int = FIT_WIDTH) -> CausalLinear:
        """Returns the guess from `width` + 1 latents nearest to the solutions `x` at `z`, by ridge regression."""
        rows = rows_before((z - z.mean(dim=0)).double(), width + 1)
        gram = rows.T @ rows
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        centred = (x - x.mean(dim=0)).flatten(0, 1).to(rows)
        kernel = as_kernel(torch.linalg.solve(gram + ridge, rows.T @ centred), width + 1).to(x)
        linear = cls(kernel, torch.zeros_like(x[0]))
        return cls(kernel.cpu(), (x - linear(z)).mean(dim=0).cpu())


@dataclass(frozen=True, eq=False)
class WarmStart(Guess):
    """X^(0) = `value`, an approximate answer that is to be improved, such as that of a learned inverse.

    Args:
        value: Tokens of the shape of z, (B, T, C).

    Example:
        >>> x = torch.zeros(1, 2, 1)
        >>> solver = jf.Solver(jf.Whole(), jf.WarmStart(x))
    """

    value: Tokens

    def __call__(self, z: Tokens) -> Tokens:
        check_floating("WarmStart: value", self.value, tuple(z.shape))
        return self.value.to(z)
