"""How the residual g(x) - x is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from jacobiflow.codec import family, register
from jacobiflow.flows.base import Block
from jacobiflow.solvers.guess import Guess


@family
class Correction(ABC):
    """Turns an iterate and its image under g into the next iterate, on a run of swept tokens.

    Tokens before the run are final: their residual is 0.
    """

    @abstractmethod
    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The next iterate. Where the residual of all tokens before t is zero, entry t must be g_t."""

    def check(self, token_channels: int) -> None:  # noqa: B027  most fit any tokens
        """**Raises** `ValueError` where the correction does not fit tokens of that many channels."""

    @classmethod
    def fit(
        cls, block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess, context: Tensor | None
    ) -> Correction | None:
        """The correction of this kind that suits a block with solutions `x` at `z`, for `jacobiflow.tune` to try.

        `None` where there is nothing to fit.
        """
        return None


@register("plain")
@dataclass(frozen=True)
class Plain(Correction):
    """X^(k+1) = g(X^(k)): the nonlinear Jacobi step, eq. (3) of the paper."""

    def __call__(self, x: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return g
