"""The one loop of all solvers: samples enter, are swept, and leave."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import check_positive
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import Block, put_run, run_of, supports
from jacobiflow.solvers.fronts import Fronts, SweepResult
from jacobiflow.solvers.graphs import SweepGraphs
from jacobiflow.solvers.partition import SlidingRun
from jacobiflow.solvers.solver import Solver

_LEAVING = 0.25  # share of finished samples at which the batch is made anew: copying its keys costs about a sweep
_LOOK = 4  # sweeps on a GPU between looks at the fronts: a few too many cost less than waiting for every one


class Deadline:
    """The end of a `time_limit` in seconds that starts now; `None` for no limit."""

    def __init__(self, time_limit: float | None) -> None:
        self.time_limit = time_limit if time_limit is None else check_positive("time_limit", time_limit)
        self.started = time.perf_counter()

    def check(self) -> None:
        """Raises TimeoutError if the time is over."""
        if self.time_limit is not None and time.perf_counter() - self.started > self.time_limit:
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
    counts: np.ndarray  # sweeps that each token has had from a common front
    least: int = 0  # all fronts are at this token or after it ...
    most: int = 0  # ... and at this one or before it
    stale: int = 0  # tokens before a common front whose keys are a sweep behind
    sweeps: int = 0
    graphs: SweepGraphs | None = None

    def locate(self, front: np.ndarray) -> None:
        """Notes where the samples stand."""
        self.least, self.most = int(front.min()), int(front.max())


class Loop:
    """Sweeps the rows of `z` until all their tokens are final; `x` and `fronts` are then in the caller's order."""

    def __init__(
        self, block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int, deadline: Deadline,
        in_bf16: bool = False,
    ) -> None:  # fmt: skip
        self.z, self.solver, self.context, self.slots = z, solver, context, slots
        self.block: Any = block
        self.deadline, self.in_bf16 = deadline, in_bf16
        self.length = z.shape[1]
        self.guess = solver.guess(z)
        self.x = torch.empty_like(self.guess)
        self.fronts = Fronts.enter(len(z), z)
        self.sweeps = self.token_evaluations = 0
        self._limits = _sweep_limits(solver, self.length)
        self._entered = 0
        stopping, partition = solver.stopping, solver.partition
        has_only_tolerance = stopping.max_sweeps is stopping.ebound is None
        slides = isinstance(partition, SlidingRun)
        self._per_sample = has_only_tolerance and slides and supports(block, "per_sample_front")
        self._is_on_host = z.device.type == "cpu"

    def run(self) -> None:
        """Sweeps until all samples have left."""
        while (batch := self._enter()) is not None:
            while batch is not None:
                self.sweeps += 1
                batch.sweeps += 1
                self._sweep(batch)
                batch = self._exchange(batch)
                self.deadline.check()

    # --------------------------------------------------------------------------------------------- entering and leaving

    def _enter(self) -> _Batch | None:
        """A batch of samples that enter together; `None` if none is left."""
        rows = self._next(self.slots)
        if rows.start == rows.stop:
            return None
        # Copies, since other samples may take their places.
        x, z, guess = self.guess[rows].clone(), self.z[rows].clone(), self.guess[rows].clone()
        cache = self.block.init_cache(z, None if self.context is None else self.context[rows].clone())
        if self.in_bf16:
            cache = self.block.to_bf16(cache)
        counts = np.zeros(self.length, dtype=np.int64)
        batch = _Batch(np.arange(rows.start, rows.stop), Fronts.enter(len(z), z), x, z, guess, cache, counts)
        return self._with_graphs(batch)

    def _with_graphs(self, batch: _Batch) -> _Batch:
        """The batch with graphs of its sweeps, if a GPU can have them and all runs are of one size, as of a window."""
        if not self._is_on_host and self._per_sample and supports(self.block, "graph_safe"):
            size = cast(SlidingRun, self.solver.partition).run_size(self.length)
            if size < self.length:
                batch.graphs = SweepGraphs(self.block, batch.x, batch.z, batch.cache, size)
        return batch

    def _next(self, count: int) -> slice:
        """The next samples that enter."""
        first, self._entered = self._entered, min(self._entered + count, len(self.z))
        return slice(first, self._entered)

    def _exchange(self, batch: _Batch) -> _Batch | None:
        """The batch without the samples that have finished, and with others in their places; `None` if all have."""
        if not self._per_sample:
            if batch.least < self.length:
                return batch
            batch.fronts.sweeps += batch.sweeps
            self._leave(batch, np.arange(len(batch.sample)))
            return None
        if not self._is_on_host and batch.sweeps % _LOOK:
            return batch
        front = batch.fronts.front.cpu().numpy().copy()
        batch.locate(front)
        finished = (front >= self.length).nonzero()[0]
        if len(finished) < len(front) and len(finished) < _LEAVING * len(front):
            return batch
        self._leave(batch, finished)
        waiting = min(len(finished), len(self.z) - self._entered)
        if waiting:
            self._refill(batch, finished[:waiting])
            front[finished[:waiting]] = 0
            batch.locate(front)
        if waiting == len(finished):
            return batch
        return self._close(batch, finished[waiting:], front) if len(finished) - waiting < len(front) else None

    def _leave(self, batch: _Batch, places: np.ndarray) -> None:
        """Notes the answers of the samples at these places."""
        sample, index = self._index(batch.sample[places]), self._index(places)
        self.x[sample] = batch.x[index]
        self.fronts.put(sample, batch.fronts, index)

    def _refill(self, batch: _Batch, places: np.ndarray) -> None:
        """Puts new samples at the `places` of finished ones, whose memory they take."""
        rows, index = self._next(len(places)), self._index(places)
        self.block.refill(batch.cache, index, None if self.context is None else self.context[rows])
        batch.x[index], batch.z[index], batch.guess[index] = self.guess[rows], self.z[rows], self.guess[rows]
        batch.fronts.put(index, Fronts.enter(len(places), self.z), slice(None))
        batch.sample[places] = np.arange(rows.start, rows.stop)

    def _close(self, batch: _Batch, places: np.ndarray, front: np.ndarray) -> _Batch:
        """The batch without the samples at `places`, into which the last ones move."""
        num = len(front) - len(places)
        source, target = np.setdiff1d(np.arange(num, len(front)), places), places[places < num]
        moved = self._index(source), self._index(target)
        for rows in (batch.x, batch.z, batch.guess):
            rows[moved[1]] = rows[moved[0]]
        batch.fronts.put(moved[1], batch.fronts, moved[0])
        batch.sample[target], front[target] = batch.sample[source], front[source]
        smaller = replace(
            batch, sample=batch.sample[:num], x=batch.x[:num], z=batch.z[:num], guess=batch.guess[:num],
            fronts=batch.fronts.first(num), cache=self.block.move(batch.cache, *moved, num),
        )  # fmt: skip
        smaller.locate(front[:num])
        return self._with_graphs(smaller)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.z.device)

    # -------------------------------------------------------------------------------------------------------- one sweep

    def _sweep(self, batch: _Batch) -> None:
        """Sweeps the run at the front of each sample, and moves the fronts."""
        fronts = batch.fronts
        if self._per_sample:
            fronts.sweeps += fronts.front < self.length
        start, size, g = self._evaluate(batch)
        old = run_of(batch.x, start, size)
        if batch.most > self.length - size:  # a run that would leave the sequence starts earlier: what is final stays
            is_final = torch.arange(size, device=g.device) < (fronts.front - start)[:, None]
            g = torch.where(is_final.unsqueeze(-1), old, g)
        if size == 1:
            put_run(batch.x, g, start)
            self._move(batch, start, 1, 1)
            return
        fronts.exact.fill_(False)
        new, result = self._correct(batch, start, old, g)
        atol, ebound = self.solver.stopping.atol, self.solver.stopping.ebound
        is_early = ebound is not None and bool((new - old).norm() <= ebound * batch.x.numel())
        self._put(batch, start, new, result.overflowed)
        if self._per_sample:
            passed, _ = fronts.pass_tokens(result, atol)
            self._move(batch, start, passed, size)
            if result.overflowed is not None:
                fronts.front = fronts.front.masked_fill(fronts.failed, self.length)  # which is to be solved again
        else:
            count = size if is_early else self._count(batch, batch.least, size)
            together, current = fronts.pass_together(result, atol, count, is_early)
            self._move(batch, start, together, together)
            batch.stale = together - current

    def _evaluate(self, batch: _Batch) -> tuple[int | Tensor, int, Tensor]:
        """The start of the runs, one number if it is common to all samples; their size; and g there."""
        graphs, least, stale = batch.graphs, batch.least, batch.stale
        size = self._stop(least) - least if graphs is None else graphs.size  # at the end too, or it needs a graph more
        self.token_evaluations += len(batch.sample) * (size + stale)
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

    def _move(self, batch: _Batch, start: int | Tensor, passed: int | Tensor, most: int) -> None:
        """Moves the fronts by the tokens that are `passed`, at most so many."""
        if self._per_sample:
            batch.fronts.front = batch.fronts.front.clamp(min=start + passed)
            batch.most = min(batch.most + most, self.length)
        else:
            batch.least = batch.most = batch.least + most

    def _stop(self, first: int) -> int:
        """The end of the run that starts at `first`."""
        partition = self.solver.partition
        stop = partition.stop(first, self.length)
        if not first < stop <= self.length:
            raise InputValueError(f"{partition!r}: a run from token {first} to {stop}, of {self.length} tokens")
        return stop

    def _correct(
        self, batch: _Batch, start: int | Tensor, old: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n c"], SweepResult]:
        """The next iterate of each run, and its changes."""
        new = self.solver.correction(old, g)
        if new is g:
            residual = change = (g - old).abs_().amax(dim=-1)
        else:
            residual, step = (torch.stack((g, new)) - old).abs_().amax(dim=-1)
            change = torch.maximum(residual, step)
            fails = batch.fronts.correction_fails(start, residual)
            if not self._is_on_host or fails.any():
                new = torch.where(fails.view(-1, 1, 1), g, new)
                change = torch.where(fails[:, None], residual, change)
        is_finite = self._is_on_host and math.isfinite(change.sum())  # a sum that overflows alone does no harm
        return new, SweepResult(residual, change, None if is_finite else ~change.isfinite())

    def _put(self, batch: _Batch, start: int | Tensor, new: Float[Tensor, "b n c"], overflowed: Tensor | None) -> None:
        """Sets the run of each sample; an entry that overflows, to the guess."""
        if overflowed is not None:
            is_finite = new.isfinite().all(dim=-1, keepdim=True)
            new = torch.where(is_finite, new, run_of(batch.guess, start, new.shape[1]))
        put_run(batch.x, new, start)

    def _count(self, batch: _Batch, first: int, size: int) -> int:
        """The number of leading tokens of the run that have had their sweeps; 0 if sweeps are not limited."""
        if self._limits is None:
            return 0
        run = slice(first, first + size)
        batch.counts[run] += 1
        return int(np.logical_and.accumulate(batch.counts[run] >= self._limits[run]).sum())


def _sweep_limits(solver: Solver, length: int) -> np.ndarray | None:
    """The number of sweeps of each token at most; `None` if nothing limits them."""
    counts = solver.stopping.max_sweeps
    if not isinstance(counts, tuple):
        return None if counts is None else np.full(length, min(counts, length))
    _, segment = np.unique([solver.partition.stop(t, length) for t in range(length)], return_inverse=True)
    return np.array([min(count, length) for count in counts])[segment]
