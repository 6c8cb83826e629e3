"""Corrections: the next iterate from the residual g(x) - x."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import no_gradients
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.convolution import FIT_WIDTH, Convolution, as_kernel, rows_before
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import Piece, register_piece

_RIDGE = 2e-2
"""The ridge penalty, relative to the mean square of the residuals."""
_MIN_RESIDUAL = 3e-5
"""Residuals below it are rounding, and are not fitted."""


class Correction(Piece):
    """Turns an iterate and its image under g into the next iterate, on a run of tokens; those before it are final.

    Example:
        >>> class Damped(jf.Correction):
        ...     def __call__(self, x, g):
        ...         return g
        >>> solver = jf.Solver(jf.Whole(), correction=Damped())
    """

    @abstractmethod
    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Returns the next iterate. If the residual of all tokens before t is zero, entry t must be g_t."""

    def check(self, token_dim: int) -> None:
        """Raises ValueError if the correction does not fit tokens of that many values."""

    @classmethod
    def fit(cls, problem: Problem, x: Tokens, start: Tokens) -> Correction | None:
        """Returns the correction for `jacobiflow.tune` to try on a problem with solutions `x`, if it can be fitted.

        `start` is X^(0).
        """
        return None


@register_piece("plain")
@dataclass(frozen=True)
class Plain(Correction):
    """X^(k+1) = g(X^(k)): the nonlinear Jacobi step, eq. (3) of the paper.

    Example:
        >>> jf.Plain()(torch.zeros(1, 2, 1), torch.ones(1, 2, 1)).flatten()
        tensor([1., 1.])
    """

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return g


@register_piece("chord")
@dataclass(frozen=True, eq=False, repr=False)
class Chord(Convolution, Correction):
    """A chord (simplified Newton) step with a calibrated, banded estimate of the inverse Jacobian:

        X^(k+1) = X^(k) + (I + B) r,    r = g(X^(k)) - X^(k),    (B r)_t = sum over d = 1..w of kernel[d-1] r_(t-d).

    Newton's step is (I - Gamma)^-1 r with Gamma = dg/dx strictly lower triangular (Appendix A of the paper). That
    inverse is I plus a strictly lower triangular matrix. B is this matrix, one for all samples and positions, cut to
    the w tokens before each.

    Example:
        >>> jf.Chord(torch.zeros(3, 4, 4))
        Chord(kernel=(3, 4, 4))
    """

    kernel: Float[Tensor, "w c c"]

    def __post_init__(self) -> None:
        self.check_kernel()

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        residual = (g - x).nan_to_num_(0.0, 0.0, 0.0)  # an overflow does not help its successors
        return self.convolve(residual, add=g, delay=1)

    def check(self, token_dim: int) -> None:
        if token_dim != self.kernel.shape[1]:
            raise InputValueError(f"{self!r}, but the tokens have {token_dim} values: calibrate this flow")

    @classmethod
    def fit(cls, problem: Problem, x: Tokens, start: Tokens, width: int = FIT_WIDTH) -> Chord:
        """Fits the chord over `width` tokens that best predicts errors x - X^(k) from residuals, by ridge regression.

        The errors are those of `width` sweeps of all tokens from `start`, with the chord fitted to the sweeps so far.
        Each token has the same weight, whatever the size of its residuals.
        """
        _, length, token_dim = x.shape
        chord = cls(torch.zeros(width, token_dim, token_dim, device="cpu"))
        cross = torch.zeros(width * token_dim, token_dim, dtype=torch.float64, device=x.device)
        gram = cross.new_zeros(len(cross), len(cross))
        ridge = _RIDGE * torch.eye(len(cross), dtype=gram.dtype, device=gram.device)
        current, count = start, 0
        with no_gradients(problem.block):
            for _ in range(min(width, length)):
                g, _ = problem.evaluate(current)
                residual = (g - current).nan_to_num(0.0, 0.0, 0.0)
                rows = rows_before(residual.double(), width, delay=1)
                size = (rows.square().mean(dim=1) + residual.flatten(0, 1).double().square().mean(dim=1)).sqrt()
                used = size > _MIN_RESIDUAL
                if not used.any():
                    break
                weight = torch.where(used, size.reciprocal(), 0).unsqueeze(1)
                rows = rows * weight
                gram += rows.T @ rows
                cross += rows.T @ ((x - current - residual).flatten(0, 1) * weight)
                count += int(used.sum())
                chord = cls(as_kernel(torch.linalg.solve(gram + count * ridge, cross), width).to(x))
                current = chord(current, g)
                current = torch.where(torch.isfinite(current).all(dim=2, keepdim=True), current, start)
        return cls(chord.kernel.clone().cpu())
