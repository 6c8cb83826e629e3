"""Where the samples of a batch stand, kept in NumPy on the host, where the loop decides."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from jacobiflow.solvers.stopping import Stopping

_GROWTH = 4.0  # a residual that many times the least so far ...
_PATIENCE = 3  # ... for so many sweeps in a row: the correction does not fit this sample


@dataclass
class Fronts:
    """An entry for each sample of the batch.

    **Attributes:** `sample`, its place in the caller's order; `front`, its tokens before this are final; `least`, its
    smallest residual since its run last took in new tokens; `growing`, for how many sweeps in a row the residual was
    far above that; `reached`, where its latest run ended.
    """

    sample: np.ndarray
    front: np.ndarray
    least: np.ndarray
    growing: np.ndarray
    reached: np.ndarray

    @classmethod
    def enter(cls, sample: np.ndarray) -> Fronts:
        """Samples that stand at their first token."""
        front, growing, reached = (np.zeros(len(sample), dtype=np.int64) for _ in range(3))
        return cls(sample, front, np.full(len(sample), np.inf), growing, reached)

    def take(self, rows: np.ndarray) -> Fronts:
        """The samples at `rows`."""
        return Fronts(*(getattr(self, entry.name)[rows] for entry in fields(self)))

    def join(self, other: Fronts) -> Fronts:
        """These samples and then the others."""
        return Fronts(*(np.concatenate((getattr(self, e.name), getattr(other, e.name))) for e in fields(self)))

    def correction_fails(self, start: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """The samples whose correction is given up: for so many sweeps in a row residuals were far above the least.

        `residual` has the tokens of each sample's run, which begins at `start`. Only tokens are judged that the latest
        sweep had too: residuals of new ones say nothing of the correction.
        """
        size = residual.shape[1]
        swept = np.arange(size) < (self.reached - start)[:, None]
        grew = ~(np.where(swept, residual, 0).max(axis=1) <= _GROWTH * self.least)
        given_up = self.growing >= _PATIENCE
        self.growing = np.where(given_up, self.growing, np.where(grew, self.growing + 1, 0))
        largest = residual.max(axis=1)
        self.least = np.where(start + size > self.reached, largest, np.fmin(self.least, largest))
        self.reached = start + size
        return self.growing >= _PATIENCE


class Tally:
    """What became of every sample, in the caller's order.

    **Attributes:** `residual`, the largest change that the last sweep of a token made; `failed`, a token overflowed
    when the front passed it; `missed`, a token was passed by a number of sweeps, not by the tolerance; `sweeps`, how
    many the sample was part of; `exact`, every token was computed from final ones.
    """

    def __init__(self, samples: int) -> None:
        self.residual = np.zeros(samples)
        self.failed = np.zeros(samples, dtype=bool)
        self.missed = np.zeros(samples, dtype=bool)
        self.exact = np.ones(samples, dtype=bool)
        self.sweeps = np.zeros(samples, dtype=np.int64)

    def raise_residual(self, sample: np.ndarray, sizes: np.ndarray) -> None:
        """Take in the sizes of changes, a row for each sample."""
        self.residual[sample] = np.maximum(self.residual[sample], sizes.max(axis=1))


@dataclass(frozen=True)
class Swept:
    """What a sweep of a run did, per sample and token: on the host.

    **Attributes:** `start` of each sample's run; `residual`, |g(x) - x|; `change`, the larger of it and the step that
    was made; `overflowed`, where that is not finite, `None` where all is finite; `early`, the change of the whole run
    met the early stop's bound; `counted`, the end of the tokens that have had their number of sweeps, 0 where there is
    no such number.
    """

    start: np.ndarray
    residual: np.ndarray
    change: np.ndarray
    overflowed: np.ndarray | None
    early: bool
    counted: int


def advance(fronts: Fronts, tally: Tally, stopping: Stopping, swept: Swept, shared: bool) -> tuple[np.ndarray, int]:
    """By how many tokens of its run each sample's front moves on; notes in `tally` how these tokens ended.

    Leading tokens that changed by at most the tolerance are done, and one more, which was computed from final ones
    (Proposition 1 of the paper); so are tokens that have had their number of sweeps, and all of a run that stops early.
    With `shared`, all samples move on together.

    **Returns** these numbers, and the token before which the keys in the cache are those of final values, to within the
    tolerance: tokens that a number of sweeps passes have keys that are a sweep behind.
    """
    sample, size = fronts.sample, swept.change.shape[1]
    if swept.overflowed is not None:
        at_front = np.minimum(fronts.front - swept.start, size - 1)
        tally.failed[sample] |= swept.overflowed[np.arange(len(sample)), at_front]
    if stopping.atol is None:
        settled = np.zeros(swept.change.shape, dtype=bool)
    else:
        settled = np.logical_and.accumulate(swept.change <= stopping.atol, axis=1)
        tally.raise_residual(sample, np.where(settled, swept.residual, 0))
    lead = settled.sum(axis=1)
    lead[tally.failed[sample]] = size  # the others do not wait for one that is to be solved again
    if shared:
        lead[:] = lead.min()
    passed = np.minimum(lead + 1, size)
    cached = int((swept.start + passed).min())
    stop = int(swept.start[0]) + size if swept.early else swept.counted
    if stop > cached:
        passed[:] = stop - swept.start
        exact = np.concatenate((np.ones((len(sample), 1), dtype=bool), settled[:, :-1]), axis=1)
        left = np.where(exact, 0, np.nan_to_num(swept.residual, nan=np.inf))[:, : passed[0]]
        tally.raise_residual(sample, left)
        if swept.early:
            cached = stop
        else:
            tally.missed[sample] |= ~(exact | settled)[:, : passed[0]].all(axis=1)
    if swept.overflowed is not None:
        tally.failed[sample] |= (swept.overflowed & (np.arange(size) < passed[:, None])).any(axis=1)
    return passed, cached
