"""How the residual g(x) - x is applied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.solvers.convolution import StackedKernel, causal_convolution, check_kernel


class Correction(Protocol):
    """Turns an iterate and its image under g into the next iterate, on a run of swept tokens.

    Tokens before the run are final: their residual is 0.
    """

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The next iterate. Where the residual of all tokens before t is zero, entry t must be g_t."""
        ...


@dataclass(frozen=True)
class Plain:
    """X^(k+1) = g(X^(k)): the nonlinear Jacobi step, eq. (3) of the paper."""

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return g


@dataclass(frozen=True, eq=False, repr=False)
class Chord:
    """A chord (simplified Newton) step with a calibrated, banded estimate of the inverse Jacobian:

        X^(k+1) = X^(k) + (I + B) r,    r = g(X^(k)) - X^(k),    (B r)_t = sum over d = 1..w of kernel[d-1] r_(t-d).

    Newton's step is (I - Gamma)^-1 r with Gamma = dg/dx strictly lower triangular (Appendix A of the paper), so its
    inverse is I plus a strictly lower triangular matrix. B is that matrix, one for all samples and positions, cut to
    the w tokens before each: `jacobiflow.calibrate` fits it to the errors that sweeps meet. Its cost is a convolution
    over the run, w C^2 multiplications a token; its size w C^2 numbers.

    **Arguments:** `kernel` (w, C, C): how the residual of the token d places before adds to a token's step,
    `kernel[d - 1] @ r`.

    **Raises** `ValueError` where `kernel` is not such a tensor, or is not finite.
    """

    kernel: Float[Tensor, "w c c"]

    def __post_init__(self) -> None:
        check_kernel("Chord", self.kernel)

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        if x.shape[-1] != self.kernel.shape[1]:
            raise ValueError(f"{self!r}, but the tokens have {x.shape[-1]}: calibrate this flow")
        residual = (g - x).nan_to_num_(0.0, 0.0, 0.0)  # what overflowed says nothing of its successors
        return causal_convolution(residual, self._stacked, add=g, delay=1)

    @cached_property
    def _stacked(self) -> StackedKernel:
        return StackedKernel(self.kernel)

    def __repr__(self) -> str:
        width, channels, _ = self.kernel.shape
        return f"Chord({width} tokens, {channels} channels)"

    def __eq__(self, other: object) -> bool:
        return torch.equal(self.kernel, other.kernel) if isinstance(other, Chord) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.kernel.flatten().tolist()))
