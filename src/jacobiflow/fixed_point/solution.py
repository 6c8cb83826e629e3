"""The solution of a fixed-point problem, its status and its cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.utils.deprecation import renamed_attributes


class Status(IntEnum):
    """The end of the solve of a sample.

    Example:
        >>> jf.Status.MAX_SWEEPS.message
        'stopped by max_sweeps; raise it, or give a tolerance, for a smaller residual'
    """

    CONVERGED = 0
    MAX_SWEEPS = 1
    ROUNDING = 2
    NONFINITE = 3

    @property
    def message(self) -> str:
        """Its meaning and the remedy."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "every token changed by at most the tolerance in its last sweep, was stopped early, or is exact",
    Status.MAX_SWEEPS: "stopped by max_sweeps; raise it, or give a tolerance, for a smaller residual",
    Status.ROUNDING: "the residual is above the tolerance, and so is that of an exact solve: the network rounds "
    "coarsely; raise the tolerance or use a wider dtype",
    Status.NONFINITE: "a value of the exact inverse overflowed; use lower guidance or a wider dtype",
}


@renamed_attributes(resolved_sequentially="used_fallback")
@dataclass(frozen=True, eq=False)
class Solution:
    """The solved tokens of one block, in its causal order, and their cost.

    Attributes:
        x: The tokens.
        status: A `Status` per sample.
        residual: The largest |g(x) - x| if certified, else the largest change that a token's last sweep made (0 for a
            token that is exact by Proposition 1).
        log_det: The sum of log_scale(x) over all entries, at this x: log|det dx/dz| in nats. A certificate's
            pass gives it, and so does native code; else it is NaN.
        exact: True for samples all of whose tokens were computed from final ones, one at a time.
        used_fallback: True for samples that were solved again token by token.
        sample_sweeps: Sweeps that each sample was part of until it was final.
        network_calls: Evaluations of the block, certificates included.
        token_evaluations: Tokens times samples over these calls.
        backend: "native" if the block's `sequential_inverse` solved it, "graphs" for token by token in CUDA graphs (or
            without them, if a capture failed), "sweeps" for sweeps in PyTorch.
        obstacle: Why `sequential_inverse` did not solve it token by token; `None` if it did, or was not asked to.
        seconds: Wall-clock time, certificates included.

    Example:
        >>> flow, z = jf.load("digits-p1"), torch.ones(2, 64, 1)
        >>> solution = jf.solve(flow.blocks[0], z, jf.Solver(jf.Sequential()))
        >>> solution.exact, solution.sweeps
        (tensor([True, True]), 64)
    """

    x: Float[Tensor, "b t c"]
    status: Int[Tensor, " b"]
    residual: Float[Tensor, " b"]
    log_det: Float[Tensor, " b"]
    exact: Bool[Tensor, " b"]
    used_fallback: Bool[Tensor, " b"]
    sample_sweeps: Int[Tensor, " b"]
    sweeps: int
    network_calls: int
    token_evaluations: int
    backend: str
    obstacle: str | None = None
    seconds: float = 0.0

    def merge(self, rows: Bool[Tensor, " b"], other: Solution) -> Solution:
        """Returns this solution with the samples `rows` replaced by those of `other`; costs are added."""
        names = ("x", "status", "residual", "log_det", "exact")
        replaced = {name: getattr(self, name).index_put((rows,), getattr(other, name)) for name in names}
        costs = ("sweeps", "network_calls", "token_evaluations")
        return replace(
            self,
            **replaced,
            **{name: getattr(self, name) + getattr(other, name) for name in costs},
            sample_sweeps=self.sample_sweeps.index_put((rows,), other.sample_sweeps, accumulate=True),
            obstacle=self.obstacle or other.obstacle,
        )
