"""A batch of samples that share a front."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.fixed_point.engine import SampleQueue, SweepBatch
from jacobiflow.fixed_point.progress import offsets
from jacobiflow.fixed_point.solver import Solver


class SharedFront(SweepBatch):
    """Samples that share a front, which waits for the slowest of them."""

    def __init__(
        self, queue: SampleQueue, rows: slice, solver: Solver, max_change: float | None, in_bf16: bool
    ) -> None:
        super().__init__(queue, rows, solver, max_change, in_bf16)
        self._rows, self._front = rows, 0
        self._sweeps_left = _max_sweeps_per_token(solver, self.num_tokens)
        self._num_outdated_keys = 0  # of tokens before the front, which are a sweep behind

    @property
    def is_finished(self) -> bool:
        return self._front >= self.num_tokens

    def step(self) -> None:
        front, stop, outdated = self._front, self._run_stop(self._front), self._num_outdated_keys
        g = self._update(front - outdated, stop)[:, outdated:]
        if stop == front + 1:
            self.x[:, front:stop] = g
            self._front, self._num_outdated_keys = stop, 0
        else:
            old, ebound = self.x[:, front:stop], self.solver.stopping.ebound
            is_early = ebound is not None and bool((g - old).norm() <= ebound * self.x.numel())
            residual = self._iterate(front, old, g)
            self._sweeps_left[front:stop] -= 1
            num_exhausted = int(np.logical_and.accumulate(self._sweeps_left[front:stop] <= 0).sum())
            num_accepted, self._num_outdated_keys = self._count_accepted(residual, num_exhausted, is_early)
            self._front += num_accepted

    def _count_accepted(self, residual: Float[Tensor, "b n"], num_exhausted: int, is_early: bool) -> tuple[int, int]:
        """Returns how many tokens of the run all samples pass, and how many of their keys are then a sweep behind.

        All samples pass as many tokens as the slowest one. The `num_exhausted` leading tokens of the run, which have no
        sweeps left, are passed in any case. An early stop passes the whole run.
        """
        progress, size = self.progress, residual.shape[1]
        num_accepted = progress.count_accepted(residual, self.max_change)
        # The others do not wait for a sample that overflowed, which is solved again.
        slowest = 1 if self.max_change is None else int(torch.where(progress.nonfinite, size, num_accepted).min())
        if is_early:
            num_exhausted = size
        if num_exhausted <= slowest:
            return slowest, 0
        is_beyond = offsets(residual) >= num_accepted[:, None]
        progress.record_residual(torch.where(is_beyond, residual, 0)[:, :num_exhausted])
        progress.nonfinite |= ~residual[:, :num_exhausted].isfinite().all(1)
        if is_early:
            return num_exhausted, 0
        progress.hit_max_sweeps |= num_accepted < num_exhausted
        return num_exhausted, num_exhausted - slowest

    def exchange(self, queue: SampleQueue) -> None:
        if self.is_finished:
            self.progress.sweeps.fill_(self.sweeps)
            queue.store(self._rows, self, slice(None))


def _max_sweeps_per_token(solver: Solver, num_tokens: int) -> np.ndarray:
    """The largest number of sweeps of each token; as many as there are tokens suffice."""
    counts = solver.stopping.max_sweeps
    if not isinstance(counts, tuple):
        return np.full(num_tokens, min(counts or num_tokens, num_tokens))
    _, segment = np.unique([solver.partition.stop(t, num_tokens) for t in range(num_tokens)], return_inverse=True)
    return np.array([min(count, num_tokens) for count in counts])[segment]
