"""The fronts of the samples of a batch, and their moves after a sweep; all of it on the device of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GROWTH = 4.0  # a residual that many times the least so far ...
_PATIENCE = 3  # ... for so many sweeps in a row: the correction does not fit this sample


class SweepResult(NamedTuple):
    """The changes that a sweep of a run made, per sample and token."""

    residual: Float[Tensor, "b n"]  # |g(x) - x|
    change: Float[Tensor, "b n"]  # the larger of it and the step that was made; not finite if the token overflowed
    is_early: bool  # the early stop holds for the whole run


@dataclass
class Fronts:
    """An entry for each sample: its front and the state of its solve."""

    front: Int[Tensor, " b"]  # its tokens before this are final; not used if all samples share a front
    residual: Float[Tensor, " b"]  # the largest change that the last sweep of a token made
    failed: Bool[Tensor, " b"]  # a token overflowed when the front passed it
    missed: Bool[Tensor, " b"]  # a token was passed by a number of sweeps, not by the tolerance
    exact: Bool[Tensor, " b"]  # every token was computed from final ones
    sweeps: Int[Tensor, " b"]  # the number that it was part of
    least: Float[Tensor, " b"]  # its smallest residual since its run last took in new tokens
    growing: Int[Tensor, " b"]  # for how many sweeps in a row the residual was far above that
    reached: Int[Tensor, " b"]  # the end of its latest run

    @classmethod
    def enter(cls, num: int, like: Tensor) -> Fronts:
        """Returns so many samples at their first token, on the device of `like`, with residuals in its dtype."""
        front, sweeps, growing, reached = torch.zeros(4, num, dtype=torch.int64, device=like.device)
        failed, missed = torch.zeros(2, num, dtype=torch.bool, device=like.device)
        residual = like.new_zeros(num)
        least = torch.full_like(residual, torch.inf)
        return cls(front, residual, failed, missed, ~failed, sweeps, least, growing, reached)

    def put(self, rows: Int[Tensor, " m"], others: Fronts, places: Int[Tensor, " m"] | slice) -> None:
        """Replaces `rows` by the `places` of others, in place."""
        for entry in fields(self):
            getattr(self, entry.name)[rows] = getattr(others, entry.name)[places]

    def first(self, num: int) -> Fronts:
        return Fronts(*(getattr(self, entry.name)[:num] for entry in fields(self)))

    def correction_fails(self, start: int | Tensor, residual: Float[Tensor, "b n"]) -> Bool[Tensor, " b"]:
        """Returns the samples whose correction is given up: residuals stay far above the least for a few sweeps.

        The runs begin at `start`. A new token's residual does not tell whether the correction works.
        """
        is_known = _steps(residual) < (self.reached - start)[:, None]
        grew = ~(torch.where(is_known, residual, 0).amax(1) <= _GROWTH * self.least)
        self.growing = (self.growing + 1) * (grew | (self.growing >= _PATIENCE))
        largest, end = residual.amax(1), start + residual.shape[1]
        self.least = torch.where(self.reached < end, largest, torch.fmin(self.least, largest))
        self.reached = self.reached.clamp(min=end)
        return self.growing >= _PATIENCE

    def pass_tokens(self, sweep: SweepResult, atol: float | None) -> Int[Tensor, " b"]:
        """Returns how many leading tokens of its run each sample passes.

        It passes those that changed by at most `atol`, and one more, which was computed from final ones (Proposition 1
        of the paper).
        """
        is_settled = (sweep.change <= (-torch.inf if atol is None else atol)).cumprod(1).bool()
        passed = is_settled.sum(1).add_(1).clamp_(max=is_settled.shape[1])
        self._note(torch.where(is_settled, sweep.residual, 0))
        # Only the last token passed can have overflowed; the others are settled.
        self.failed |= ~sweep.change.gather(1, passed[:, None] - 1).isfinite()[:, 0]
        return passed

    def pass_together(
        self, sweep: SweepResult, atol: float | None, each: Int[Tensor, " b"], count: int
    ) -> tuple[int, int]:
        """Returns how many tokens of their common run all samples pass, and how many keys are then a sweep behind.

        They pass as many as the slowest, of the numbers `each` that `pass_tokens` returned; at least `count`, which
        have had their number of sweeps; and the whole run by an early stop.
        """
        size = sweep.change.shape[1]
        # The others do not wait for a sample that is to be solved again.
        passed = 1 if atol is None else int(torch.where(self.failed, size, each).min())
        if sweep.is_early:
            count = size
        if count <= passed:
            return passed, 0
        is_beyond = _steps(sweep.residual) >= each[:, None]
        self._note(torch.where(is_beyond, sweep.residual, 0)[:, :count])
        self.failed |= ~sweep.change[:, :count].isfinite().all(1)
        if sweep.is_early:
            return count, 0
        self.missed |= each < count
        return count, count - passed

    def _note(self, residual: Float[Tensor, "b n"]) -> None:
        self.residual = torch.maximum(self.residual, residual.amax(1))


def _steps(run: Tensor) -> Int[Tensor, " n"]:
    return torch.arange(run.shape[1], device=run.device)
