"""The loop of all solvers: samples enter, are swept, and leave."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import put_run, run_of, supports
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.cuda_graphs import SweepGraphs
from jacobiflow.fixed_point.fronts import Fronts, SweepResult
from jacobiflow.fixed_point.partition import SlidingRun
from jacobiflow.fixed_point.solver import Solver
from jacobiflow.utils.checks import check_positive

_LEAVING = 0.25  # share of finished samples at which the batch is made anew: copying its keys costs about a sweep
_LOOK = 4  # sweeps on a GPU between looks at the fronts: a few too many cost less than waiting for every one


class Deadline:
    """The end of a `time_limit` in seconds that starts now; `None` for no limit."""

    def __init__(self, time_limit: float | None) -> None:
        self.time_limit = math.inf if time_limit is None else check_positive("time_limit", time_limit)
        self.end = time.perf_counter() + self.time_limit

    def check(self) -> None:
        """Raises TimeoutError if the time is over."""
        if time.perf_counter() > self.end:
            raise TimeoutError(f"not solved within time_limit={self.time_limit:g} s")


@dataclass
class _Batch:
    """The samples that are swept together."""

    sample: np.ndarray  # their places in the caller's order
    fronts: Fronts
    x: Tensor
    z: Tensor
    guess: Tensor
    cache: Any
    sweeps_left: np.ndarray  # of each token
    sweeps_before: int  # of the loop, when they entered
    least: int = 0  # all fronts are at this token or after it ...
    most: int = 0  # ... and at this one or before it
    stale: int = 0  # tokens before a common front whose keys are a sweep behind
    graphs: SweepGraphs | None = None


@dataclass
class Loop:
    """Sweeps the rows of `z` until all their tokens are final; `x` and `fronts` are then in the caller's order."""

    block: Any
    z: Tensor
    solver: Solver
    context: Tensor | None
    slots: int
    deadline: Deadline
    in_bf16: bool = False
    sweeps: int = 0
    token_evaluations: int = 0

    def __post_init__(self) -> None:
        self.length = self.z.shape[1]
        self.guess = self.solver.guess(self.z)
        self.x = torch.empty_like(self.guess)
        self.fronts = Fronts.enter(len(self.z), self.z)
        self._entered = 0
        slides = isinstance(self.solver.partition, SlidingRun) and self.solver.stopping.is_tolerance
        self._is_shared = not (slides and supports(self.block, "per_sample_front"))  # one front for all samples

    def run(self) -> None:
        while self._entered < len(self.z):
            batch = self._enter()
            self._sweep(batch)
            while self._exchange(batch):
                self._sweep(batch)

    def _enter(self) -> _Batch:
        rows = self._next(self.slots)
        # Copies, since other samples may take their places.
        x, z, guess = self.guess[rows].clone(), self.z[rows].clone(), self.guess[rows].clone()
        cache = self.block.init_cache(z, None if self.context is None else self.context[rows].clone())
        if self.in_bf16:
            cache = self.block.to_bf16(cache)
        sample, limits = np.arange(rows.start, rows.stop), _sweep_limits(self.solver, self.length)
        batch = _Batch(sample, Fronts.enter(len(z), z), x, z, guess, cache, limits, self.sweeps)
        batch.graphs = self._graphs(batch)
        return batch

    def _next(self, count: int) -> slice:
        """The next samples that enter, at most so many."""
        first, self._entered = self._entered, min(self._entered + count, len(self.z))
        return slice(first, self._entered)

    def _leave(self, batch: _Batch, places: np.ndarray) -> None:
        sample, index = self._index(batch.sample[places]), self._index(places)
        self.x[sample] = batch.x[index]
        self.fronts.put(sample, batch.fronts, index)

    def _sweep(self, batch: _Batch) -> None:
        """Sweeps the run at the front of each sample, and moves the fronts."""
        fronts, atol = batch.fronts, self.solver.stopping.atol
        if not self._is_shared:
            fronts.sweeps += fronts.front < self.length
        start, size, g = self._evaluate(batch)
        old = run_of(batch.x, start, size)
        if batch.most > self.length - size:  # a run that would leave the sequence starts earlier
            is_final = torch.arange(size, device=g.device) < (fronts.front - start)[:, None]
            g = torch.where(is_final.unsqueeze(-1), old, g)
        passed: int | Tensor = 1
        if size == 1:
            put_run(batch.x, g, start)
        else:
            result = self._step(batch, start, old, g)
            passed = fronts.pass_tokens(result, atol)
            if self._is_shared:
                passed, batch.stale = fronts.pass_together(result, atol, passed, self._num_over(batch, size))
        if self._is_shared:
            batch.least = batch.most = batch.least + int(passed)
        else:
            batch.most = min(batch.most + size, self.length)
            front = fronts.front.clamp(min=start + passed)
            fronts.front = front.masked_fill(fronts.failed, self.length)  # to be solved again

    def _evaluate(self, batch: _Batch) -> tuple[int | Tensor, int, Tensor]:
        """The start of the runs, one number if it is common to all samples; their size; and g there."""
        graphs, least, stale = batch.graphs, batch.least, batch.stale
        size = self._stop(least) - least if graphs is None else graphs.size  # at the end too, or it needs a graph more
        self.sweeps += 1
        self.token_evaluations += len(batch.sample) * (size + stale)
        self.deadline.check()
        last = self.length - size
        if graphs is None and least in (batch.most, last):
            g = self.block.update(batch.x, batch.z, least - stale, least + size, batch.cache)
            batch.stale = 0
            return least, size, g[:, stale:]
        start = batch.fronts.front if batch.most <= last else batch.fronts.front.clamp(max=last)
        end = min(batch.most + size, self.length)
        if graphs is not None:
            return start, size, graphs(start, end)
        return start, size, self.block.update_at(batch.x, batch.z, start, size, end, batch.cache)

    def _stop(self, first: int) -> int:
        partition = self.solver.partition
        stop = partition.stop(first, self.length)
        if not first < stop <= self.length:
            raise InputValueError(f"{partition!r}: a run from token {first} to {stop}, of {self.length} tokens")
        return stop

    def _num_over(self, batch: _Batch, size: int) -> int:
        """The number of leading tokens of the run that have had their sweeps."""
        run = slice(batch.least, batch.least + size)
        batch.sweeps_left[run] -= 1
        return int(np.logical_and.accumulate(batch.sweeps_left[run] <= 0).sum())

    def _step(
        self, batch: _Batch, start: int | Tensor, old: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]
    ) -> SweepResult:
        """Sets the run of each sample to its next iterate; an entry that overflows, to the guess."""
        batch.fronts.exact.fill_(False)
        new = self.solver.correction(old, g)
        if new is g:
            residual = change = (g - old).abs_().amax(dim=-1)
        else:
            residual, step = (torch.stack((g, new)) - old).abs_().amax(dim=-1)
            change = torch.maximum(residual, step)
            fails = batch.fronts.correction_fails(start, residual)[:, None]
            new = torch.where(fails[:, None], g, new)
            change = torch.where(fails, residual, change)
        ebound = self.solver.stopping.ebound
        is_early = ebound is not None and bool((new - old).norm() <= ebound * batch.x.numel())
        guess = run_of(batch.guess, start, change.shape[1])
        put_run(batch.x, torch.where(change.isfinite().unsqueeze(-1), new, guess), start)
        return SweepResult(residual, change, is_early)

    def _exchange(self, batch: _Batch) -> bool:
        """Lets samples that have finished leave, and others take their places; False if no sample is left."""
        if self._is_shared:
            if batch.least == self.length:
                batch.fronts.sweeps += self.sweeps - batch.sweeps_before
                self._leave(batch, np.arange(len(batch.sample)))
            return batch.least < self.length
        if batch.x.is_cuda and self.sweeps % _LOOK:
            return True
        front = batch.fronts.front.cpu().numpy()
        finished = (front >= self.length).nonzero()[0]
        if len(finished) >= _LEAVING * len(front):
            self._leave(batch, finished)
            rows = self._next(len(finished))
            num_new = rows.stop - rows.start
            front = np.concatenate((front[front < self.length], np.zeros(num_new, dtype=front.dtype)))
            if not len(front):
                return False
            if num_new:
                self._refill(batch, finished[:num_new], rows)
            if num_new < len(finished):
                self._close(batch, finished[num_new:])
        batch.least, batch.most = int(front.min()), int(front.max())
        return True

    def _refill(self, batch: _Batch, places: np.ndarray, rows: slice) -> None:
        """Puts the samples `rows` at the `places` of finished ones, whose memory they take."""
        index = self._index(places)
        self.block.refill(batch.cache, index, None if self.context is None else self.context[rows])
        batch.x[index], batch.z[index], batch.guess[index] = self.guess[rows], self.z[rows], self.guess[rows]
        batch.fronts.put(index, Fronts.enter(len(places), self.z), slice(None))
        batch.sample[places] = np.arange(rows.start, rows.stop)

    def _close(self, batch: _Batch, places: np.ndarray) -> None:
        """Removes the samples at `places`, into which the last ones move."""
        num = len(batch.sample) - len(places)
        source, target = np.setdiff1d(np.arange(num, len(batch.sample)), places), places[places < num]
        batch.sample[target] = batch.sample[source]
        moved, into = self._index(source), self._index(target)
        for rows in (batch.x, batch.z, batch.guess):
            rows[into] = rows[moved]
        batch.fronts.put(into, batch.fronts, moved)
        batch.cache = self.block.move(batch.cache, moved, into, num)
        batch.sample, batch.fronts = batch.sample[:num], batch.fronts.first(num)
        batch.x, batch.z, batch.guess = batch.x[:num], batch.z[:num], batch.guess[:num]
        batch.graphs = self._graphs(batch)

    def _graphs(self, batch: _Batch) -> SweepGraphs | None:
        """Graphs of the sweeps of a batch, if a GPU can have them and all runs are of one size, as of a window."""
        partition: Any = self.solver.partition
        if not batch.x.is_cuda or self._is_shared or not supports(self.block, "graph_safe"):
            return None
        size = partition.run_size(self.length)
        return SweepGraphs(self.block, batch.x, batch.z, batch.cache, size) if size < self.length else None

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.z.device)


def _sweep_limits(solver: Solver, length: int) -> np.ndarray:
    """The number of sweeps of each token at most; as many as there are tokens suffice."""
    counts = solver.stopping.max_sweeps
    if not isinstance(counts, tuple):
        return np.full(length, min(counts or length, length))
    _, segment = np.unique([solver.partition.stop(t, length) for t in range(length)], return_inverse=True)
    return np.array([min(count, length) for count in counts])[segment]
