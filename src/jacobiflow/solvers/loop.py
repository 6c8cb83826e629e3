"""The one loop of all solvers: samples enter, are swept, and leave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from jacobiflow.flows.base import Block, FrontPerSample, LowPrecision, put_run, run_of
from jacobiflow.solvers.fronts import Fronts, Swept, Tally, advance
from jacobiflow.solvers.partition import SlidingRun, Sweep
from jacobiflow.solvers.solver import Solver

_STEP = Sweep(1, 1)
LEAVING = 0.25  # share of finished samples at which the batch is made anew: copying its keys costs about a sweep


@dataclass
class _Batch:
    """The samples that are swept together: their tensors on the device, and their fronts on the host.

    The cache holds the keys of the tokens before `cached` - 1, to within the tolerance. `swept` has how many sweeps
    each token has had from the shared front, `sweeps` all of them, and `last` is the latest.
    """

    fronts: Fronts
    x: Tensor
    z: Tensor
    guess: Tensor
    cache: Any
    swept: np.ndarray
    cached: int = 0
    sweeps: int = 0
    last: Sweep | None = None


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
        self._slides = isinstance(solver.partition, SlidingRun)
        own = only_tolerance and self._slides and isinstance(block, FrontPerSample)
        self._own_fronts: Any = block if own else None  # the block, where each sample has a front of its own

    def run(self) -> None:
        """Sweep until all samples have left."""
        batch = self._exchange(None)
        while batch is not None:
            self._sweep(batch)
            batch = self._exchange(batch)

    # --------------------------------------------------------------------------------------------- entering and leaving

    def _exchange(self, batch: _Batch | None) -> _Batch | None:
        """The batch without the samples that have finished, and with those that were waiting for their slots."""
        if batch is not None:
            if self._own_fronts is None:
                if batch.fronts.front[0] < self.length:
                    return batch
                self.tally.sweeps[batch.fronts.sample] = batch.sweeps
            done = batch.fronts.front >= self.length
            if not done.all() and done.sum() < LEAVING * len(done):
                return batch
            self.x[self._index(batch.fronts.sample[done])] = batch.x[self._index(done.nonzero()[0])]
            batch = None if done.all() else self._take(batch, (~done).nonzero()[0])
        free = self.slots - (0 if batch is None else len(batch.fronts.sample))
        entering = np.arange(self._entered, min(self._entered + free, len(self.z)))
        if len(entering) == 0:
            return batch
        self._entered += len(entering)
        rows = slice(entering[0], entering[-1] + 1)
        z, guess = self.z[rows], self.guess[rows]
        cache = self.block.init_cache(z, None if self.context is None else self.context[rows])
        if self.low_precision:
            cache = cast(LowPrecision, self.block).lower(cache)
        new = _Batch(Fronts.enter(entering), guess.clone(), z, guess, cache, np.zeros(self.length, dtype=np.int64))
        return new if batch is None else self._join(batch, new)

    def _take(self, batch: _Batch, rows: np.ndarray) -> _Batch:
        index, fronts = self._index(rows), batch.fronts.take(rows)
        cache = self._own_fronts.take(batch.cache, index)
        x, z, guess = (getattr(batch, name)[index] for name in ("x", "z", "guess"))
        return replace(batch, fronts=fronts, x=x, z=z, guess=guess, cache=cache, cached=int(fronts.front.min()))

    def _join(self, old: _Batch, new: _Batch) -> _Batch:
        x, z, guess = (torch.cat((getattr(old, name), getattr(new, name))) for name in ("x", "z", "guess"))
        cache = self._own_fronts.join((old.cache, new.cache))
        return replace(old, fronts=old.fronts.join(new.fronts), x=x, z=z, guess=guess, cache=cache, cached=0)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.z.device)

    # -------------------------------------------------------------------------------------------------------- one sweep

    def _sweep(self, batch: _Batch) -> None:
        fronts, sample = batch.fronts, batch.fronts.sample
        first = int(fronts.front[0] if self._own_fronts is None else fronts.front.min())
        stop = self._stop(batch, first)
        size, start, at = stop - first, fronts.front, cast("int | Tensor", first)
        self.sweeps += 1
        batch.sweeps += 1
        if self._own_fronts is not None:
            self.tally.sweeps[sample] += fronts.front < self.length
            # A run that would leave the sequence starts earlier: all are of one size, and what is final stays so.
            start = np.minimum(fronts.front, self.length - size)
            at = first if (start == first).all() else self._index(start)
        g = self._evaluate(batch, at, start, size)
        if size == 1:
            put_run(batch.x, g, at)
            fronts.front += 1
            batch.cached, batch.last = (stop if isinstance(at, int) else int(fronts.front.min())), _STEP
            return
        self.tally.exact[sample] = False
        if start is not fronts.front and (final := fronts.front - start).any():  # so many leading tokens of a run
            g = torch.where(self._index(final[:, None] <= np.arange(size)).unsqueeze(-1), g, run_of(batch.x, at, size))
        batch.swept[first:stop] += 1
        swept = self._step(batch, at, start, g)
        passed, batch.cached = advance(fronts, self.tally, self.solver.stopping, swept, self._own_fronts is None)
        fronts.front = start + passed
        if self._own_fronts is not None:
            fronts.front[self.tally.failed[sample]] = self.length
        batch.last = Sweep(size, int(passed.min()))

    def _stop(self, batch: _Batch, first: int) -> int:
        partition: Any = self.solver.partition
        if self._slides:
            stop = min(first + partition.run_size(self.length, batch.last), self.length)
        else:
            stop = partition.stop(first, self.length)
        if not first < stop <= self.length:
            raise ValueError(f"{partition!r}: a run from token {first} to {stop}, of {self.length} tokens")
        return stop

    def _evaluate(self, batch: _Batch, at: int | Tensor, start: np.ndarray, size: int) -> Tensor:
        """g on the run of each sample."""
        if isinstance(at, int):
            first, stop = at, at + size
            self.token_evaluations += len(start) * (stop - batch.cached)
            return self.block.update(batch.x, batch.z, batch.cached, stop, batch.cache)[:, first - batch.cached :]
        self.token_evaluations += len(start) * size
        return cast(
            Tensor, self._own_fronts.update_at(batch.x, batch.z, at, size, int(start.max()) + size, batch.cache)
        )

    def _step(self, batch: _Batch, at: int | Tensor, start: np.ndarray, g: Tensor) -> Swept:
        """Set the run of each sample to what the correction makes of g; an entry that overflows, to the guess."""
        size = g.shape[1]
        old = run_of(batch.x, at, size)
        new = self.solver.correction(old, g)
        residual, change = _sizes(old, g, new)
        if new is not g:
            failing = batch.fronts.correction_fails(start, residual)
            if failing.any():
                new = torch.where(self._index(failing).view(-1, 1, 1), g, new)
                change = np.where(failing[:, None], residual, change)
        ebound = self.solver.stopping.ebound
        early = ebound is not None and bool((new - old).norm() <= ebound * batch.x.numel())
        finite, overflowed = np.isfinite(change), None
        if not finite.all():
            overflowed = ~finite
            kept = torch.isfinite(new).all(dim=-1, keepdim=True)
            new = torch.where(kept, new, run_of(batch.guess, at, size))
        put_run(batch.x, new, at)
        return Swept(start, residual, change, overflowed, early, self._counted(batch, int(start[0]), size))

    def _counted(self, batch: _Batch, first: int, size: int) -> int:
        """The end of the tokens, from `first` on, that have had their number of sweeps; 0 where there is no such."""
        if self._limits is None:
            return 0
        run = slice(first, first + size)
        return first + int(np.logical_and.accumulate(batch.swept[run] >= self._limits[run]).sum())


def _sweep_limits(solver: Solver, length: int) -> np.ndarray | None:
    """How many sweeps each token gets at most; `None` where nothing limits them."""
    counts = solver.stopping.max_sweeps
    if not isinstance(counts, tuple):
        return None if counts is None else np.full(length, min(counts, length))
    _, segment = np.unique([solver.partition.stop(t, length) for t in range(length)], return_inverse=True)
    return np.array([min(count, length) for count in counts])[segment]


def _sizes(old: Tensor, g: Tensor, new: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per token on the host, the largest |g(x) - x|, and the larger of it and the step that was made."""
    if new is g:
        host = (g - old).abs_().amax(dim=-1).cpu().numpy()
        return host, host
    host = (torch.stack((g, new)) - old).abs_().amax(dim=-1).cpu().numpy()
    return host[0], host.max(axis=0)
