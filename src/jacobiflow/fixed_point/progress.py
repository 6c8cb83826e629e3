"""The progress of the samples of a batch. All of it is on the device of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class SampleProgress:
    """The progress of the solve of each sample.

    Attributes:
        residual: The largest change that the last sweep of a token made.
        nonfinite: A token was not finite when the front passed it.
        hit_max_sweeps: A token was passed by a number of sweeps, not by the tolerance.
        exact: Every token was computed from final ones.
        sweeps: The sweeps that the sample was part of.
    """

    residual: Float[Tensor, " b"]
    nonfinite: Bool[Tensor, " b"]
    hit_max_sweeps: Bool[Tensor, " b"]
    exact: Bool[Tensor, " b"]
    sweeps: Int[Tensor, " b"]

    @classmethod
    def initial(cls, num: int, z: Tensor) -> SampleProgress:
        """Returns the progress of `num` samples at their first token, on the device and in the dtype of `z`."""
        nonfinite, hit_max_sweeps = torch.zeros(2, num, dtype=torch.bool, device=z.device)
        sweeps = torch.zeros(num, dtype=torch.int64, device=z.device)
        return cls(z.new_zeros(num), nonfinite, hit_max_sweeps, ~nonfinite, sweeps)

    def scatter(
        self, rows: Int[Tensor, " m"] | slice, others: SampleProgress, source: Int[Tensor, " m"] | slice
    ) -> None:
        """Replaces `rows` by the rows `source` of others, in place."""
        for entry in fields(self):
            getattr(self, entry.name)[rows] = getattr(others, entry.name)[source]

    def first(self, num: int) -> SampleProgress:
        """Returns the progress of the first `num` samples."""
        return SampleProgress(*(getattr(self, entry.name)[:num] for entry in fields(self)))

    def count_accepted(self, residual: Float[Tensor, "b n"], max_change: float | None) -> Int[Tensor, " b"]:
        """Returns how many leading tokens of its run each sample passes, by the residuals, infinite or NaN on overflow.

        It passes those that changed by at most `max_change`, and one more, which was computed from final ones
        (Proposition 1 of the paper).
        """
        is_final = (residual <= (-torch.inf if max_change is None else max_change)).cumprod(1).bool()
        num_accepted = is_final.sum(1).add_(1).clamp_(max=is_final.shape[1])
        self.record_residual(torch.where(is_final, residual, 0))
        # Only the last token passed can have overflowed; the others are final.
        self.nonfinite |= ~residual.gather(1, num_accepted[:, None] - 1).isfinite()[:, 0]
        return num_accepted

    def record_residual(self, residual: Float[Tensor, "b n"]) -> None:
        """Records the residuals of tokens that are passed."""
        self.residual = torch.maximum(self.residual, residual.amax(1))


def offsets(run: Tensor) -> Int[Tensor, " n"]:
    """Returns 0 .. n-1 for a run (B, N)."""
    return torch.arange(run.shape[1], device=run.device)
