"""Where the samples of a batch stand, and how a sweep moves them on.

Where tokens are on a GPU, all of it stays there: a sweep that waited for the host would leave the GPU idle. Where they
are on the host it is kept in NumPy, whose operations on a few numbers are quicker than PyTorch's. What is used of both
has the same names in both, so that it is written once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GROWTH = 4.0  # a residual that many times the least so far ...
_PATIENCE = 3  # ... for so many sweeps in a row: the correction does not fit this sample

Array = Any  # of NumPy where the tokens are on the host, else of PyTorch beside them


def as_array(tensor: Tensor) -> Array:
    """The tensor as an `Array`."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def on_host(array: Array) -> np.ndarray:
    """In NumPy; waits for a device."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


@dataclass
class Fronts:
    """An entry for each sample of the batch.

    **Attributes:** `front`, its tokens before this are final. What became of it: `residual`, the largest change that
    the last sweep of a token made; `failed`, a token overflowed when the front passed it; `missed`, a token was passed
    by a number of sweeps, not by the tolerance; `exact`, every token was computed from final ones; `sweeps`, how many
    it was part of. For `correction_fails`: `least`, its smallest residual since its run last took in new tokens;
    `growing`, for how many sweeps in a row the residual was far above that; `reached`, where its latest run ended.
    """

    front: Array
    residual: Array
    failed: Array
    missed: Array
    exact: Array
    sweeps: Array
    least: Array
    growing: Array
    reached: Array

    @classmethod
    def enter(cls, num: int, like: Tensor) -> Fronts:
        """So many samples at their first token; residuals are in the dtype of the tokens `like`."""
        where = like.device

        def counts() -> Array:
            return as_array(torch.zeros(num, dtype=torch.int64, device=where))

        def flags() -> Array:
            return as_array(torch.zeros(num, dtype=torch.bool, device=where))

        residual = as_array(torch.zeros(num, dtype=like.dtype, device=where))
        least = as_array(torch.full((num,), torch.inf, dtype=like.dtype, device=where))
        return cls(counts(), residual, flags(), flags(), ~flags(), counts(), least, counts(), counts())

    def move(self, source: Array, target: Array, num: int) -> Fronts:
        """The first `num` samples, after those at `source` went to `target`."""
        for entry in fields(self):
            values = getattr(self, entry.name)
            values[target] = values[source]
        return Fronts(*(getattr(self, entry.name)[:num] for entry in fields(self)))

    def refill(self, rows: Array, like: Tensor) -> None:
        """New samples stand at `rows` now."""
        new = Fronts.enter(len(rows), like)
        for entry in fields(self):
            getattr(self, entry.name)[rows] = getattr(new, entry.name)

    def raise_residual(self, sizes: Array, xp: Any) -> None:
        """Take in the sizes of changes, a row for each sample."""
        self.residual = xp.maximum(self.residual, xp.amax(sizes, 1))

    def correction_fails(self, start: Array, residual: Array, steps: Array, xp: Any) -> Array:
        """The samples whose correction is given up: for so many sweeps in a row residuals were far above the least.

        `residual` has the tokens of each sample's run, which begins at `start`. Only tokens are judged that the latest
        sweep had too: residuals of new ones say nothing of the correction.
        """
        size = residual.shape[1]
        swept = steps[:size] < (self.reached - start)[:, None]
        grew = ~(xp.amax(xp.where(swept, residual, 0), 1) <= _GROWTH * self.least)
        given_up = self.growing >= _PATIENCE
        self.growing = xp.where(given_up, self.growing, xp.where(grew, self.growing + 1, 0))
        largest = xp.amax(residual, 1)
        self.least = xp.where(start + size > self.reached, largest, xp.fmin(self.least, largest))
        self.reached = start + size
        return self.growing >= _PATIENCE

    def pass_settled(self, start: Array, swept: Swept, atol: float, steps: Array, xp: Any) -> None:
        """Move each front past the leading tokens of its run, from `start`, that changed by at most `atol`.

        And past one more, which was computed from final ones (Proposition 1 of the paper). A sample that has failed is
        at its end: it is to be solved again.
        """
        size, length = swept.change.shape[1], len(steps)
        settled = xp.cumprod(swept.change <= atol, 1) > 0
        self.raise_residual(xp.where(settled, swept.residual, 0), xp)
        passed = xp.clip(settled.sum(1) + 1, None, size)
        self.front = start + passed
        if swept.overflowed is not None:
            self.failed = self.failed | (swept.overflowed & (steps[:size] < passed[:, None])).any(1)
            self.front = xp.where(self.failed, length, self.front)

    def pass_together(
        self, swept: Swept, atol: float | None, early: bool, counted: int, steps: Array, xp: Any
    ) -> tuple[int, int]:
        """By how many tokens of their run all samples move on together.

        `early`: the change of the whole run met the bound of an early stop; `counted` leading tokens have had their
        number of sweeps. **Returns** that, and how many of them have keys of their final values in the cache: those of
        tokens that are passed by their number of sweeps are a sweep behind.
        """
        size = swept.change.shape[1]
        if swept.overflowed is not None:
            self.failed = self.failed | swept.overflowed[:, 0]
        passed = 1
        settled = swept.change < 0  # nowhere
        if atol is not None:
            settled = xp.cumprod(swept.change <= atol, 1) > 0
            self.raise_residual(xp.where(settled, swept.residual, 0), xp)
            lead = xp.where(self.failed, size, settled.sum(1))  # the others do not wait for one that is solved again
            passed = min(int(lead.min()) + 1, size)
        current, stop = passed, size if early else counted
        if stop > passed:
            passed = stop
            exact = xp.concatenate((xp.ones_like(settled[:, :1]), settled[:, :-1]), 1)
            infinite = xp.where(swept.residual == swept.residual, swept.residual, xp.inf)
            self.raise_residual(xp.where(exact, 0, infinite)[:, :passed], xp)
            if early:
                current = passed
            else:
                self.missed = self.missed | ~(exact | settled)[:, :passed].all(1)
        if swept.overflowed is not None:
            self.failed = self.failed | swept.overflowed[:, :passed].any(1)
        return passed, current


class Tally:
    """What became of every sample, in the caller's order: `residual`, `failed`, `missed`, `exact` and `sweeps`."""

    def __init__(self, samples: int) -> None:
        self.residual = np.zeros(samples)
        self.failed = np.zeros(samples, dtype=bool)
        self.missed = np.zeros(samples, dtype=bool)
        self.exact = np.ones(samples, dtype=bool)
        self.sweeps = np.zeros(samples, dtype=np.int64)

    def note(self, sample: np.ndarray, fronts: Fronts, rows: np.ndarray) -> None:
        """What became of the `sample`s, which are at `rows` of the batch."""
        names = ("residual", "failed", "missed", "exact", "sweeps")
        found = [getattr(fronts, name) for name in names]
        if not isinstance(found[0], np.ndarray):
            found = list(torch.stack([values.to(fronts.residual.dtype) for values in found]).cpu().numpy())  # one copy
        for name, values in zip(names, found, strict=True):
            getattr(self, name)[sample] = values[rows]


@dataclass(frozen=True)
class Swept:
    """What a sweep of a run did, per sample and token.

    **Attributes:** `residual`, |g(x) - x|; `change`, the larger of it and the step that was made; `overflowed`, where
    that is not finite, `None` where all is known to be finite.
    """

    residual: Array
    change: Array
    overflowed: Array | None
