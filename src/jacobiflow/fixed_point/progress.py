"""The progress of the samples of a batch. All of it is on the device of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GROWTH_FACTOR = 4.0
"""A residual above this multiple of the smallest one so far counts as growing."""
_MAX_GROWING_SWEEPS = 3
"""After this many sweeps in a row with a growing residual, the correction of a sample is turned off."""


class SweepChanges(NamedTuple):
    """The changes that a sweep of a run made, per sample and token.

    Attributes:
        residual: |g(x) - x|, the largest of the values of a token.
        change: The larger of the residual and of the step that was taken; not finite if the token overflowed.
        is_early: The early stop holds for the whole run.
    """

    residual: Float[Tensor, "b n"]
    change: Float[Tensor, "b n"]
    is_early: bool


@dataclass
class SampleProgress:
    """The progress of the solve of each sample.

    Attributes:
        residual: The largest change that the last sweep of a token made.
        nonfinite: A token was not finite when the front passed it.
        hit_max_sweeps: A token was passed by a number of sweeps, not by the tolerance.
        exact: Every token was computed from final ones.
        sweeps: The sweeps that the sample was part of.
        min_residual: The smallest residual since its run last took in new tokens.
        num_growing: The sweeps in a row in which the residual was far above `min_residual`.
        run_stop: The end of its latest run.
    """

    residual: Float[Tensor, " b"]
    nonfinite: Bool[Tensor, " b"]
    hit_max_sweeps: Bool[Tensor, " b"]
    exact: Bool[Tensor, " b"]
    sweeps: Int[Tensor, " b"]
    min_residual: Float[Tensor, " b"]
    num_growing: Int[Tensor, " b"]
    run_stop: Int[Tensor, " b"]

    @classmethod
    def initial(cls, num: int, z: Tensor) -> SampleProgress:
        """Returns the progress of `num` samples at their first token, on the device and in the dtype of `z`."""
        sweeps, num_growing, run_stop = torch.zeros(3, num, dtype=torch.int64, device=z.device)
        nonfinite, hit_max_sweeps = torch.zeros(2, num, dtype=torch.bool, device=z.device)
        residual = z.new_zeros(num)
        min_residual = torch.full_like(residual, torch.inf)
        return cls(residual, nonfinite, hit_max_sweeps, ~nonfinite, sweeps, min_residual, num_growing, run_stop)

    def scatter(
        self, rows: Int[Tensor, " m"] | slice, others: SampleProgress, source: Int[Tensor, " m"] | slice
    ) -> None:
        """Replaces `rows` by the rows `source` of others, in place."""
        for entry in fields(self):
            getattr(self, entry.name)[rows] = getattr(others, entry.name)[source]

    def first(self, num: int) -> SampleProgress:
        """Returns the progress of the first `num` samples."""
        return SampleProgress(*(getattr(self, entry.name)[:num] for entry in fields(self)))

    def update_correction_state(self, start: int | Tensor, residual: Float[Tensor, "b n"]) -> Bool[Tensor, " b"]:
        """Returns the samples whose correction is turned off, since their residuals keep growing.

        The runs begin at `start`. A new token's residual does not tell whether the correction works.
        """
        is_known = offsets(residual) < (self.run_stop - start)[:, None]
        grew = ~(torch.where(is_known, residual, 0).amax(1) <= _GROWTH_FACTOR * self.min_residual)
        self.num_growing = (self.num_growing + 1) * (grew | (self.num_growing >= _MAX_GROWING_SWEEPS))
        largest, stop = residual.amax(1), start + residual.shape[1]
        self.min_residual = torch.where(self.run_stop < stop, largest, torch.fmin(self.min_residual, largest))
        self.run_stop = self.run_stop.clamp(min=stop)
        return self.num_growing >= _MAX_GROWING_SWEEPS

    def count_accepted(self, changes: SweepChanges, max_change: float | None) -> Int[Tensor, " b"]:
        """Returns how many leading tokens of its run each sample passes.

        It passes those that changed by at most `max_change`, and one more, which was computed from final ones
        (Proposition 1 of the paper).
        """
        is_final = (changes.change <= (-torch.inf if max_change is None else max_change)).cumprod(1).bool()
        num_accepted = is_final.sum(1).add_(1).clamp_(max=is_final.shape[1])
        self.record_residual(torch.where(is_final, changes.residual, 0))
        # Only the last token passed can have overflowed; the others are final.
        self.nonfinite |= ~changes.change.gather(1, num_accepted[:, None] - 1).isfinite()[:, 0]
        return num_accepted

    def record_residual(self, residual: Float[Tensor, "b n"]) -> None:
        """Records the residuals of tokens that are passed."""
        self.residual = torch.maximum(self.residual, residual.amax(1))


def offsets(run: Tensor) -> Int[Tensor, " n"]:
    """Returns 0 .. n-1 for a run (B, N)."""
    return torch.arange(run.shape[1], device=run.device)
