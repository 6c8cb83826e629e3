"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Status(IntEnum):
    """How a sample's solve ended."""

    CONVERGED = 0
    MAX_SWEEPS = 1
    ROUNDING = 2
    NONFINITE = 3

    @property
    def message(self) -> str:
        """What it means, and the remedy."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "every token changed by at most the tolerance in its last sweep, was stopped early, or is exact; "
    "the certificate is the residual",
    Status.MAX_SWEEPS: "stopped by MaxSweeps; raise it, or use a Tolerance, for a smaller residual",
    Status.ROUNDING: "its residual is above the tolerance, as is that of an exact solve: this is the rounding of the "
    "network's dtype; raise the tolerance or use a wider dtype",
    Status.NONFINITE: "a value overflowed; solve_certified finds out whether it does in the exact inverse too, which "
    "lower guidance or a wider dtype may cure",
}


@dataclass(frozen=True)
class Solution:
    """The solved tokens of one block and what they cost.

    **Attributes:**

    - `x`: the answer (B, T, C), in the block's causal order.
    - `status`: a `Status` per sample (B,).
    - `residual`: per sample (B,), the largest |g(x) - x|: of the answer where it was certified, else the largest change
        that a token's last sweep made (0 for a token that is exact by Proposition 1).
    - `exact`: samples (B,) all of whose tokens were computed from final ones, one at a time.
    - `resolved_sequentially`: samples (B,) that were solved again token by token.
    - `sample_sweeps`: sweeps that each sample (B,) was part of until it was done, those of later attempts included.
    - `sweeps`: passes of the loop, those of later attempts included.
    - `network_calls`: evaluations of the block, certificates included.
    - `token_evaluations`: tokens times samples over these calls.
    - `seconds`: wall-clock time.
    """

    x: Float[Tensor, "b t c"]
    status: Int[Tensor, " b"]
    residual: Float[Tensor, " b"]
    exact: Bool[Tensor, " b"]
    resolved_sequentially: Bool[Tensor, " b"]
    sample_sweeps: Int[Tensor, " b"]
    sweeps: int
    network_calls: int
    token_evaluations: int
    seconds: float
