"""How the residual g(x) - x is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Correction(Protocol):
    """Turns an iterate and its image under g into the next iterate, on the swept tokens from `start` on."""

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"], start: int) -> Float[Tensor, "b n c"]:
        """The next iterate. Where the residual of all tokens before t is zero, entry t must be g_t."""
        ...


@dataclass(frozen=True)
class Plain:
    """X^(k+1) = g(X^(k)): the nonlinear Jacobi step, eq. (3) of the paper."""

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"], start: int) -> Float[Tensor, "b n c"]:
        return g
