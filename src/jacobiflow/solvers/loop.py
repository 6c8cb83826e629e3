"""The one loop of all solvers: samples enter, are swept, and leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import Block, FrontPerSample, LowPrecision, Replayable, put_run, run_of
from jacobiflow.solvers.fronts import Array, Fronts, Swept, Tally, as_array, on_host
from jacobiflow.solvers.partition import SlidingRun
from jacobiflow.solvers.replay import SweepGraphs
from jacobiflow.solvers.solver import Solver

LEAVING = 0.25  # share of finished samples at which the batch is made anew: copying its keys costs about a sweep
_LOOK = 4  # sweeps on a GPU between looks at the fronts: a few too many cost less than waiting for every one


@dataclass
class _Batch:
    """The samples that are swept together, `sample` being their places in the caller's order.

    `front` is where all of them stand; `None` where fronts differ, or are on a device and not known. They are between
    `least` and `most`. The cache holds the keys of the tokens before `cached` - 1, to within the tolerance. `swept` has
    how many sweeps each token has had from the shared front, `sweeps` counts all. `graphs` are those of its sweeps on a
    GPU.
    """

    sample: np.ndarray
    fronts: Fronts
    x: Tensor
    z: Tensor
    guess: Tensor
    cache: Any
    swept: np.ndarray
    front: int | None = 0
    least: int = 0
    most: int = 0
    cached: int = 0
    sweeps: int = 0
    graphs: SweepGraphs | None = None

    def locate(self, front: np.ndarray) -> None:
        """Note where the samples stand."""
        self.least, self.most = int(front.min()), int(front.max())
        self.front = self.least if self.least == self.most else None


class Loop:
    """Sweeps the rows of `z` until all their tokens are final; `x` and `tally` then hold what came of it.

    **Attributes:** `sweeps`, and `token_evaluations`, tokens times samples over them.
    """

    def __init__(
        self, block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int, low_precision: bool = False
    ) -> None:
        self.block, self.z, self.solver, self.context, self.slots = block, z, solver, context, slots
        self.low_precision = low_precision
        self.length = z.shape[1]
        self.guess = solver.guess(z)
        self.x = torch.empty_like(self.guess)
        self.tally = Tally(len(z))
        self.sweeps = self.token_evaluations = 0
        self._limits = _sweep_limits(solver, self.length)
        self._entered = 0
        only_tolerance = solver.stopping.max_sweeps is None and solver.stopping.ebound is None
        own = only_tolerance and isinstance(solver.partition, SlidingRun) and isinstance(block, FrontPerSample)
        self._own_fronts: Any = block if own else None  # the block, where each sample has a front of its own
        self._steps: Array = as_array(torch.arange(self.length, device=z.device))
        self._host = isinstance(self._steps, np.ndarray)
        self._xp: Any = np if self._host else torch

    def run(self) -> None:
        """Sweep until all samples have left."""
        sweep = self._sweep_together if self._own_fronts is None else self._sweep_each
        while (batch := self._enter()) is not None:
            while batch is not None:
                self.sweeps += 1
                batch.sweeps += 1
                sweep(batch)
                batch = self._exchange(batch)

    # --------------------------------------------------------------------------------------------- entering and leaving

    def _enter(self) -> _Batch | None:
        """A batch of samples that enter together; `None` where none is left."""
        rows = self._next(self.slots)
        if rows.start == rows.stop:
            return None
        # Copies, since other samples may take their places.
        x, z, guess = self.guess[rows].clone(), self.z[rows].clone(), self.guess[rows].clone()
        cache = self.block.init_cache(z, None if self.context is None else self.context[rows].clone())
        if self.low_precision:
            cache = cast(LowPrecision, self.block).lower(cache)
        swept = np.zeros(self.length, dtype=np.int64)
        batch = _Batch(np.arange(rows.start, rows.stop), Fronts.enter(len(z), z), x, z, guess, cache, swept)
        return self._with_graphs(batch)

    def _with_graphs(self, batch: _Batch) -> _Batch:
        """With graphs of its sweeps, if a GPU can have them and all runs are of one size: those of a window."""
        if batch.z.device.type == "cuda" and self._own_fronts is not None and isinstance(self.block, Replayable):
            size = cast(SlidingRun, self.solver.partition).run_size(self.length)
            if size < self.length:
                batch.graphs = SweepGraphs(self.block, batch.x, batch.z, batch.cache, size)
        return batch

    def _next(self, count: int) -> slice:
        """The next samples that enter."""
        first, self._entered = self._entered, min(self._entered + count, len(self.z))
        return slice(first, self._entered)

    def _exchange(self, batch: _Batch) -> _Batch | None:
        """The batch without the samples that have finished, and with those that were waiting for their slots.

        `None` where all have.
        """
        if self._own_fronts is None:
            if batch.least < self.length:
                return batch
            batch.fronts.sweeps += batch.sweeps
            self._leave(batch, np.arange(len(batch.sample)))
            return None
        if not self._host and batch.sweeps % _LOOK:
            return batch
        front = on_host(batch.fronts.front)
        batch.locate(front)
        done = (front >= self.length).nonzero()[0]
        if len(done) < len(front) and len(done) < LEAVING * len(front):
            return batch
        self._leave(batch, done)
        waiting = min(len(done), len(self.z) - self._entered)
        if waiting:
            self._refill(batch, done[:waiting])
            front[done[:waiting]] = 0
            batch.locate(front)
        if waiting == len(done):
            return batch
        return self._close(batch, done[waiting:], front) if len(done) - waiting < len(front) else None

    def _leave(self, batch: _Batch, places: np.ndarray) -> None:
        """Note what came of the samples at these places."""
        self.x[self._index(batch.sample[places])] = batch.x[self._index(places)]
        self.tally.note(batch.sample[places], batch.fronts, places)

    def _refill(self, batch: _Batch, places: np.ndarray) -> None:
        """New samples at the `places` of finished ones, whose memory they take."""
        rows, index = self._next(len(places)), self._index(places)
        self._own_fronts.refill(batch.cache, index, None if self.context is None else self.context[rows])
        batch.x[index], batch.z[index], batch.guess[index] = self.guess[rows], self.z[rows], self.guess[rows]
        batch.fronts.refill(as_array(index), self.z)
        batch.sample[places] = np.arange(rows.start, rows.stop)

    def _close(self, batch: _Batch, places: np.ndarray, front: np.ndarray) -> _Batch:
        """The batch without the samples at `places`, into which the last ones move."""
        num = len(front) - len(places)
        source, target = np.setdiff1d(np.arange(num, len(front)), places), places[places < num]
        moved = self._index(source), self._index(target)
        for rows in (batch.x, batch.z, batch.guess):
            rows[moved[1]] = rows[moved[0]]
        batch.sample[target], front[target] = batch.sample[source], front[source]
        left = replace(
            batch, sample=batch.sample[:num], x=batch.x[:num], z=batch.z[:num], guess=batch.guess[:num],
            fronts=batch.fronts.move(as_array(moved[0]), as_array(moved[1]), num),
            cache=self._own_fronts.move(batch.cache, *moved, num),
        )  # fmt: skip
        left.locate(front[:num])
        return self._with_graphs(left)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.z.device)

    # -------------------------------------------------------------------------------------------------------- one sweep

    def _sweep_together(self, batch: _Batch) -> None:
        """A sweep of the run that starts at the front of all samples."""
        first = batch.least
        stop = self._stop(first)
        size = stop - first
        self.token_evaluations += len(batch.sample) * (stop - batch.cached)
        g = self.block.update(batch.x, batch.z, batch.cached, stop, batch.cache)[:, first - batch.cached :]
        if size == 1:
            put_run(batch.x, g, first)
            batch.least = batch.cached = stop
            return
        batch.fronts.exact[:] = False
        batch.swept[first:stop] += 1
        old = run_of(batch.x, first, size)
        new, residual, change = self._correct(batch, batch.fronts.front, old, g)
        stopping = self.solver.stopping
        early = stopping.ebound is not None and bool((new - old).norm() <= stopping.ebound * batch.x.numel())
        swept = self._put(batch, first, new, residual, change)
        counted = self._counted(batch, first, size)
        passed, current = batch.fronts.pass_together(swept, stopping.atol, early, counted, self._steps, self._xp)
        batch.fronts.front += passed
        batch.cached = first + current
        batch.least = first + passed

    def _sweep_each(self, batch: _Batch) -> None:
        """A sweep of the runs that start at each sample's own front."""
        xp, fronts, length = self._xp, batch.fronts, self.length
        size = self._stop(batch.least) - batch.least
        if batch.graphs is not None:
            size = batch.graphs.size  # at the end of the sequence too, where a smaller one would need its own graph
        fronts.sweeps = fronts.sweeps + (fronts.front < length)
        # A run that would leave the sequence starts earlier: all are of one size, and what is final stays so.
        start = fronts.front if batch.most <= length - size else xp.clip(fronts.front, None, length - size)
        common = batch.least if batch.least == length - size else batch.front
        self.token_evaluations += len(batch.sample) * size
        if common is not None and batch.graphs is None:
            at: int | Tensor = common
            g = self.block.update(batch.x, batch.z, common, common + size, batch.cache)
        else:
            at = self._tensor(start)
            end = min(batch.most + size, length)
            if batch.graphs is None:
                g = self._own_fronts.update_at(batch.x, batch.z, at, size, end, batch.cache)
            else:
                g = batch.graphs(at, end)
        old = run_of(batch.x, at, size)
        if start is not fronts.front:
            final = self._steps[:size] < (fronts.front - start)[:, None]  # so many leading tokens of a run
            g = torch.where(self._tensor(final).unsqueeze(-1), old, g)
        if size == 1:
            put_run(batch.x, g, at)
            fronts.front = xp.clip(fronts.front + 1, None, length)
        else:
            fronts.exact[:] = False
            new, residual, change = self._correct(batch, start, old, g)
            swept = self._put(batch, at, new, residual, change)
            fronts.pass_settled(start, swept, cast(float, self.solver.stopping.atol), self._steps, xp)
        batch.front, batch.most = None, min(batch.most + size, length)

    def _stop(self, first: int) -> int:
        """The end of the run that starts at `first`."""
        partition = self.solver.partition
        stop = partition.stop(first, self.length)
        if not first < stop <= self.length:
            raise InputValueError(f"{partition!r}: a run from token {first} to {stop}, of {self.length} tokens")
        return stop

    def _correct(self, batch: _Batch, start: Array, old: Tensor, g: Tensor) -> tuple[Tensor, Array, Array]:
        """What the correction makes of g; per token |g(x) - x|, and the larger of it and the step."""
        new = self.solver.correction(old, g)
        if new is g:
            residual = as_array((g - old).abs_().amax(dim=-1))
            return new, residual, residual
        both = as_array((torch.stack((g, new)) - old).abs_().amax(dim=-1))
        residual, change = both[0], self._xp.amax(both, 0)
        failing = batch.fronts.correction_fails(start, residual, self._steps, self._xp)
        if not self._host or failing.any():
            new = torch.where(self._tensor(failing).view(-1, 1, 1), g, new)
            change = self._xp.where(failing[:, None], residual, change)
        return new, residual, change

    def _put(self, batch: _Batch, at: int | Tensor, new: Tensor, residual: Array, change: Array) -> Swept:
        """Set the run of each sample; an entry that overflows, to the guess."""
        overflowed = ~self._xp.isfinite(change)
        if self._host and not overflowed.any():
            overflowed = None
        else:
            finite = torch.isfinite(new).all(dim=-1, keepdim=True)
            new = torch.where(finite, new, run_of(batch.guess, at, new.shape[1]))
        put_run(batch.x, new, at)
        return Swept(residual, change, overflowed)

    def _counted(self, batch: _Batch, first: int, size: int) -> int:
        """How many leading tokens of the run have had their number of sweeps; 0 where there is no such number."""
        if self._limits is None:
            return 0
        run = slice(first, first + size)
        return int(np.logical_and.accumulate(batch.swept[run] >= self._limits[run]).sum())

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values) if self._host else cast(Tensor, values)


def _sweep_limits(solver: Solver, length: int) -> np.ndarray | None:
    """How many sweeps each token gets at most; `None` where nothing limits them."""
    counts = solver.stopping.max_sweeps
    if not isinstance(counts, tuple):
        return None if counts is None else np.full(length, min(counts, length))
    _, segment = np.unique([solver.partition.stop(t, length) for t in range(length)], return_inverse=True)
    return np.array([min(count, length) for count in counts])[segment]
