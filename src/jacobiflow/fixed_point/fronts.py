"""The fronts of the samples of a batch, and how a sweep moves them. All of it is on the device of the tokens."""

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
        residual: |g(x) - x|, the largest over channels.
        change: The larger of the residual and of the step that was taken; not finite if the token overflowed.
        is_early: The early stop holds for the whole run.
    """

    residual: Float[Tensor, "b n"]
    change: Float[Tensor, "b n"]
    is_early: bool


@dataclass
class Fronts:
    """The front of each sample, and the progress of its solve.

    Attributes:
        front: The tokens before it are final. Not used if all samples share a front.
        residual: The largest change that the last sweep of a token made.
        nonfinite: A token was not finite when the front passed it.
        hit_max_sweeps: A token was passed by a number of sweeps, not by the tolerance.
        exact: Every token was computed from final ones.
        sweeps: The sweeps that the sample was part of.
        min_residual: The smallest residual since its run last took in new tokens.
        num_growing: The sweeps in a row in which the residual was far above `min_residual`.
        run_stop: The end of its latest run.
    """

    front: Int[Tensor, " b"]
    residual: Float[Tensor, " b"]
    nonfinite: Bool[Tensor, " b"]
    hit_max_sweeps: Bool[Tensor, " b"]
    exact: Bool[Tensor, " b"]
    sweeps: Int[Tensor, " b"]
    min_residual: Float[Tensor, " b"]
    num_growing: Int[Tensor, " b"]
    run_stop: Int[Tensor, " b"]

    @classmethod
    def initial(cls, num: int, z: Tensor) -> Fronts:
        """Returns the fronts of `num` samples at their first token, on the device and in the dtype of `z`."""
        front, sweeps, num_growing, run_stop = torch.zeros(4, num, dtype=torch.int64, device=z.device)
        nonfinite, hit_max_sweeps = torch.zeros(2, num, dtype=torch.bool, device=z.device)
        residual = z.new_zeros(num)
        min_residual = torch.full_like(residual, torch.inf)
        return cls(front, residual, nonfinite, hit_max_sweeps, ~nonfinite, sweeps, min_residual, num_growing, run_stop)

    def scatter(self, rows: Int[Tensor, " m"] | slice, others: Fronts, source: Int[Tensor, " m"] | slice) -> None:
        """Replaces `rows` by the rows `source` of others, in place."""
        for entry in fields(self):
            getattr(self, entry.name)[rows] = getattr(others, entry.name)[source]

    def first(self, num: int) -> Fronts:
        """Returns the fronts of the first `num` samples."""
        return Fronts(*(getattr(self, entry.name)[:num] for entry in fields(self)))

    def update_correction_state(self, start: int | Tensor, residual: Float[Tensor, "b n"]) -> Bool[Tensor, " b"]:
        """Returns the samples whose correction is turned off, since their residuals keep growing.

        The runs begin at `start`. A new token's residual does not tell whether the correction works.
        """
        is_known = _offsets(residual) < (self.run_stop - start)[:, None]
        grew = ~(torch.where(is_known, residual, 0).amax(1) <= _GROWTH_FACTOR * self.min_residual)
        self.num_growing = (self.num_growing + 1) * (grew | (self.num_growing >= _MAX_GROWING_SWEEPS))
        largest, stop = residual.amax(1), start + residual.shape[1]
        self.min_residual = torch.where(self.run_stop < stop, largest, torch.fmin(self.min_residual, largest))
        self.run_stop = self.run_stop.clamp(min=stop)
        return self.num_growing >= _MAX_GROWING_SWEEPS

    def count_accepted(self, sweep: SweepChanges, max_change: float | None) -> Int[Tensor, " b"]:
        """Returns how many leading tokens of its run each sample passes.

        It passes those that changed by at most `max_change`, and one more, which was computed from final ones
        (Proposition 1 of the paper).
        """
        is_final = (sweep.change <= (-torch.inf if max_change is None else max_change)).cumprod(1).bool()
        num_accepted = is_final.sum(1).add_(1).clamp_(max=is_final.shape[1])
        self._record(torch.where(is_final, sweep.residual, 0))
        # Only the last token passed can have overflowed; the others are final.
        self.nonfinite |= ~sweep.change.gather(1, num_accepted[:, None] - 1).isfinite()[:, 0]
        return num_accepted

    def count_accepted_together(
        self, sweep: SweepChanges, max_change: float | None, num_accepted: Int[Tensor, " b"], num_exhausted: int
    ) -> tuple[int, int]:
        """Returns how many tokens of their common run all samples pass, and how many keys are then a sweep behind.

        Args:
            sweep: The changes of the run.
            max_change: That of `count_accepted`.
            num_accepted: The result of `count_accepted`. All samples pass as many tokens as the slowest one.
            num_exhausted: The leading tokens of the run that have no sweeps left. They are passed in any case. An early
                stop passes the whole run.
        """
        size = sweep.change.shape[1]
        # The others do not wait for a sample that overflowed, which is solved again.
        slowest = 1 if max_change is None else int(torch.where(self.nonfinite, size, num_accepted).min())
        if sweep.is_early:
            num_exhausted = size
        if num_exhausted <= slowest:
            return slowest, 0
        is_beyond = _offsets(sweep.residual) >= num_accepted[:, None]
        self._record(torch.where(is_beyond, sweep.residual, 0)[:, :num_exhausted])
        self.nonfinite |= ~sweep.change[:, :num_exhausted].isfinite().all(1)
        if sweep.is_early:
            return num_exhausted, 0
        self.hit_max_sweeps |= num_accepted < num_exhausted
        return num_exhausted, num_exhausted - slowest

    def _record(self, residual: Float[Tensor, "b n"]) -> None:
        self.residual = torch.maximum(self.residual, residual.amax(1))


def _offsets(run: Tensor) -> Int[Tensor, " n"]:
    return torch.arange(run.shape[1], device=run.device)
