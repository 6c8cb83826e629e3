"""The one solver loop."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.flows.base import Block, FrontPerSample, KeepsNothing, LowPrecision, put_run, run_of
from jacobiflow.solvers.correction import Correction, Plain
from jacobiflow.solvers.guess import Given, Guess, Latent
from jacobiflow.solvers.partition import Partition, Segments, Whole, Window
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.stopping import MaxSweeps, Stopping, Tolerance

_GROWTH = 4.0  # a residual that many times the least so far ...
_PATIENCE = 3  # ... for so many sweeps in a row: the correction does not fit this sample
LEAVING = 0.25  # share of finished samples at which the batch is made anew: copying its keys costs about a sweep


@dataclass(frozen=True)
class Solver:
    """How to solve a block: four independent pieces, and sweeps in bfloat16 that come first.

    `Solver(Sequential())` is the exact loop, `Solver(Whole())` Jacobi, `Solver(Segments(G), stopping=MaxSweeps(J))`
    the paper's GS-Jacobi, `Solver(Window(n))` a sliding window. With `coarse`, so many sweeps of all tokens are made
    from the guess by the network in bfloat16, whose answer is then the guess: where that is several times as fast, the
    pieces have only the last digits to find.
    """

    partition: Partition = field(default_factory=Whole)
    guess: Guess = field(default_factory=Latent)
    stopping: Stopping = field(default_factory=lambda: Tolerance(1e-3))
    correction: Correction = field(default_factory=Plain)
    coarse: int = 0

    def __post_init__(self) -> None:
        if type(self.coarse) is not int or self.coarse < 0:
            raise ValueError(f"coarse={self.coarse!r}: give a number of sweeps, 0 for none")
        counts = self.stopping.max_sweeps
        if isinstance(counts, tuple) and not (
            isinstance(self.partition, Segments) and self.partition.count == len(counts)
        ):
            raise ValueError(f"{len(counts)} sweep counts for {self.partition}: give one for each of its Segments")


def solve(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None, slots: int | None = None
) -> Solution:
    """Solve x = g(x) for the inverse of `block` at `z`, by sweeps x <- g(x) over runs of tokens.

    A sweep evaluates g on the run [front, stop) that the partition chooses, and sets the run to it, or to what the
    correction makes of it. Then the front goes past the leading tokens that the sweep changed by at most the
    tolerance, and past one more: all tokens that it was computed from are final, to within the tolerance, so it is too
    (Proposition 1). T sweeps always suffice. A token that has had `max_sweeps` sweeps is passed as it is; keys in the
    cache that this leaves a sweep behind are computed again by the next sweep. Keys of tokens passed by tolerance are
    those of the value before the last sweep.

    Where a `Whole` or a `Window` stops on a tolerance and the block is a `FrontPerSample`, each sample has its own
    front, and samples that have finished leave the batch; else the batch shares one front, which waits for the slowest.

    A value that overflows is set back to the guess. A sample that had one when the front passed it ends as
    `Status.NONFINITE`; nothing here hides that, and `solve_certified` acts on it. A sample whose residual keeps growing
    under a correction is swept plainly from there on.

    **Arguments:** `block` gives g, `z` (B, T, C) is its input in its own causal order, `context` has a row per sample
    (labels, say) or is `None`. At most `slots` samples are swept at a time, all by default; the next ones enter as
    others finish (continuous batching).

    **Returns:** a `Solution`, uncertified.

    **Raises:** `ValueError` where `z` is not finite or not (B, T, C), the partition does not fit T, or the block has no
    bfloat16 network (`LowPrecision`) for coarse sweeps.
    """
    if z.ndim != 3 or not torch.isfinite(z).all():
        raise ValueError(f"z of shape {tuple(z.shape)}: give finite values (batch, tokens, channels)")
    if slots is not None and slots < 1:
        raise ValueError(f"slots={slots}: give a positive number of samples, or None for all")
    solver.partition.check(z.shape[1])
    if solver.coarse and not isinstance(block, LowPrecision):
        raise ValueError(f"coarse={solver.coarse}: {type(block).__name__} has no bfloat16 network; give 0")
    started = time.perf_counter()
    slots = slots or len(z)
    sweeps, token_evaluations, fine = 0, 0, solver
    with no_gradients(block):
        if solver.coarse:
            coarse = replace(solver, partition=Whole(), stopping=MaxSweeps(solver.coarse))
            first = _Loop(block, z, coarse, context, slots, low_precision=True)
            first.run()
            sweeps, token_evaluations = first.sweeps, first.token_evaluations
            fine = replace(solver, guess=Given(first.x))
        loop = _Loop(block, z, fine, context, slots)
        loop.run()
        failed = loop.failed | ~torch.isfinite(loop.x).all(dim=(1, 2)).cpu().numpy()
    status = np.where(failed, Status.NONFINITE, np.where(loop.missed, Status.MAX_SWEEPS, Status.CONVERGED))
    residual = np.where(failed, np.inf, loop.residual)
    return Solution(
        x=loop.x.clone(),  # outside inference mode, so that autograd takes it
        status=torch.from_numpy(status.astype(np.int64)).to(z.device),
        residual=torch.from_numpy(residual).to(z),
        resolved_sequentially=torch.zeros(len(z), dtype=torch.bool, device=z.device),
        sample_sweeps=torch.from_numpy(loop.sample_sweeps + solver.coarse).to(z.device),
        sweeps=sweeps + loop.sweeps,
        network_calls=sweeps + loop.sweeps,
        token_evaluations=token_evaluations + loop.token_evaluations,
        seconds=time.perf_counter() - started,
    )


def no_gradients(block: Block) -> AbstractContextManager[None]:
    """Inference mode, a tenth faster where a step is small, for a block that says it keeps no tensor; else no_grad.

    A tensor that a block keeps from inference mode (a mask made on first use, say) could not be trained with later.
    """
    return torch.inference_mode() if isinstance(block, KeepsNothing) else torch.no_grad()


@dataclass
class _Batch:
    """The samples that are swept together. Arrays are on the host, where the loop decides; tensors on the device."""

    sample: np.ndarray  # which ones they are
    x: Tensor
    z: Tensor
    guess: Tensor
    cache: Any
    front: np.ndarray  # tokens before it are final
    least: np.ndarray  # the smallest residual since the run last took in new tokens
    growing: np.ndarray  # sweeps in a row in which it was far above
    reached: np.ndarray  # where the latest run ended
    known: int = 0  # the cache holds the keys of the tokens before known - 1, to within the tolerance
    stops: list[int] = field(default_factory=lambda: [0])  # where each sweep's run ended
    segment: int = -1  # which one of `Segments` is swept


class _Loop:
    """Samples enter, are swept, and leave; what is known of each is kept at its place in the caller's order."""

    def __init__(
        self, block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int, low_precision: bool = False
    ) -> None:
        self.block, self.z, self.solver, self.context, self.slots = block, z, solver, context, slots
        self.low_precision = low_precision
        self.length = z.shape[1]
        self.guess = solver.guess(z)
        self.x = torch.empty_like(self.guess)
        self.residual = np.zeros(len(z))
        self.failed = np.zeros(len(z), dtype=bool)  # overflowed where the front passed
        self.missed = np.zeros(len(z), dtype=bool)  # passed by the number of sweeps, not by the tolerance
        self.sample_sweeps = np.zeros(len(z), dtype=np.int64)
        self.sweeps = self.token_evaluations = 0
        self.entered = 0
        follows = isinstance(solver.partition, Whole | Window) and solver.stopping.max_sweeps is None
        self.ragged: Any = block if follows and isinstance(block, FrontPerSample) else None

    def run(self) -> None:
        batch = self._exchange(None)
        while batch is not None:
            self._sweep(batch)
            batch = self._exchange(batch)

    def _exchange(self, batch: _Batch | None) -> _Batch | None:
        """The batch without those that have finished, and with those that were waiting for their slots."""
        if batch is not None:
            if self.ragged is None and batch.front[0] < self.length:
                return batch
            if self.ragged is None:
                self.sample_sweeps[batch.sample] = len(batch.stops) - 1
            done = batch.front >= self.length
            if not done.all() and done.sum() < LEAVING * len(done):
                return batch
            self.x[self._index(batch.sample[done])] = batch.x[self._index(done.nonzero()[0])]
            batch = None if done.all() else self._take(batch, (~done).nonzero()[0])
        free = self.slots - (0 if batch is None else len(batch.sample))
        entering = np.arange(self.entered, min(self.entered + free, len(self.z)))
        if len(entering) == 0:
            return batch
        self.entered += len(entering)
        rows = slice(entering[0], entering[-1] + 1)
        z, guess, count = self.z[rows], self.guess[rows], len(entering)
        cache = self.block.init_cache(z, None if self.context is None else self.context[rows])
        if self.low_precision:
            cache = cast(LowPrecision, self.block).lower(cache)
        front, growing, reached = (np.zeros(count, dtype=np.int64) for _ in range(3))
        new = _Batch(entering, guess.clone(), z, guess, cache, front, np.full(count, np.inf), growing, reached)
        return new if batch is None else self._join(batch, new)

    def _take(self, batch: _Batch, rows: np.ndarray) -> _Batch:
        index = self._index(rows)
        return _Batch(
            batch.sample[rows], batch.x[index], batch.z[index], batch.guess[index],
            self.ragged.take(batch.cache, index), batch.front[rows], batch.least[rows], batch.growing[rows],
            batch.reached[rows], known=int(batch.front[rows].min()),
        )  # fmt: skip

    def _join(self, old: _Batch, new: _Batch) -> _Batch:
        x, z, guess = (torch.cat((getattr(old, name), getattr(new, name))) for name in ("x", "z", "guess"))
        sample, front, least, growing, reached = (
            np.concatenate((getattr(old, name), getattr(new, name)))
            for name in ("sample", "front", "least", "growing", "reached")
        )
        return _Batch(sample, x, z, guess, self.ragged.join((old.cache, new.cache)), front, least, growing, reached)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.z.device)

    def _sweep(self, batch: _Batch) -> None:
        length = self.length
        first = int(batch.front[0] if self.ragged is None else batch.front.min())
        stop = self.solver.partition.stop(first, length)
        size, apart = stop - first, None
        batch.segment += stop > batch.stops[-1]  # the ends of `Segments` differ
        batch.stops.append(stop)
        self.sweeps += 1
        if self.ragged is not None:
            self.sample_sweeps[batch.sample] += batch.front < length
            # A run that would leave the sequence starts earlier: all are of one length, and what is final stays so.
            start = np.minimum(batch.front, length - size)
            apart = None if (start == first).all() else self._index(start)
        if apart is None:
            self.token_evaluations += len(batch.front) * (stop - batch.known)
            g = self.block.update(batch.x, batch.z, batch.known, stop, batch.cache)[:, first - batch.known :]
        else:
            self.token_evaluations += len(batch.front) * size
            g = self.ragged.update_at(batch.x, batch.z, apart, size, int(start.max()) + size, batch.cache)
        if size == 1:
            put_run(batch.x, g, first if apart is None else apart)
            batch.front += 1
            batch.known = stop if apart is None else int(batch.front.min())
            return

        if self.ragged is None:
            start = batch.front
        at = first if apart is None else apart
        old = run_of(batch.x, at, size)
        if self.ragged is not None and (final := batch.front - start).any():  # so many leading tokens of a run
            g = torch.where(self._index(final[:, None] <= np.arange(size)).unsqueeze(-1), g, old)
        new = self.solver.correction(old, g)
        change, step = self._sizes(old, g, new)
        if new is not g:
            distrusted = self._distrusted(batch, start, size, change)
            if distrusted.any():
                new = torch.where(self._index(distrusted).view(-1, 1, 1), g, new)
        finite = np.isfinite(step)
        if finite.all():
            put_run(batch.x, new, at)
            self._pass(batch, start, size, change, step, None)
        else:
            kept = torch.isfinite(new).all(dim=-1, keepdim=True)
            put_run(batch.x, torch.where(kept, new, run_of(batch.guess, at, size)), at)
            self._pass(batch, start, size, change, step, ~finite)

    @staticmethod
    def _distrusted(batch: _Batch, start: np.ndarray, size: int, change: np.ndarray) -> np.ndarray:
        """The samples whose correction is given up: for so many sweeps in a row residuals were far above the least.

        Only tokens are judged that the latest sweep had too: residuals of new ones say nothing of the correction.
        """
        stop = start + size
        swept = np.arange(size) < (batch.reached - start)[:, None]
        grew = ~(np.where(swept, change, 0).max(axis=1) <= _GROWTH * batch.least)
        given_up = batch.growing >= _PATIENCE
        batch.growing = np.where(given_up, batch.growing, np.where(grew, batch.growing + 1, 0))
        residual = change.max(axis=1)
        batch.least = np.where(stop > batch.reached, residual, np.fmin(batch.least, residual))
        batch.reached = stop
        return batch.growing >= _PATIENCE

    @staticmethod
    def _sizes(old: Tensor, g: Tensor, new: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Per token on the host, the largest |g(x) - x|, and the larger of it and the step that was made."""
        if new is g:
            host = (g - old).abs_().amax(dim=-1).cpu().numpy()
            return host, host
        host = (torch.stack((g, new)) - old).abs_().amax(dim=-1).cpu().numpy()
        return host[0], host.max(axis=0)

    def _pass(
        self, batch: _Batch, start: np.ndarray, size: int, change: np.ndarray, step: np.ndarray,
        overflowed: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Move the fronts past what is done, and note how it was."""
        sample, stopping = batch.sample, self.solver.stopping
        if overflowed is not None:
            at_front = np.minimum(batch.front - start, size - 1)
            self.failed[sample] |= overflowed[np.arange(len(sample)), at_front]
        if stopping.atol is None:
            settled = np.zeros(change.shape, dtype=bool)
        else:
            settled = np.logical_and.accumulate(step <= stopping.atol, axis=1)
            self._residual(sample, change * settled if overflowed is None else np.where(settled, change, 0))
        lead = settled.sum(axis=1)
        lead[self.failed[sample]] = size  # the others do not wait for one that is to be redone
        if self.ragged is None:
            lead[:] = lead.min()
        advance = np.minimum(lead + 1, size)
        batch.known = int((start + advance).min())

        counts = stopping.max_sweeps
        if counts is not None:
            limit = counts[batch.segment] if isinstance(counts, tuple) else counts
            if len(batch.stops) > limit and batch.stops[-limit] > batch.known:
                advance[:] = batch.stops[-limit] - start
                exact = np.concatenate((np.ones((len(sample), 1), dtype=bool), settled[:, :-1]), axis=1)
                left = np.where(exact, 0, np.nan_to_num(change, nan=np.inf))[:, : advance[0]]
                self._residual(sample, left)
                self.missed[sample] |= ~(exact | settled)[:, : advance[0]].all(axis=1)
        if overflowed is not None:
            self.failed[sample] |= (overflowed & (np.arange(size) < advance[:, None])).any(axis=1)
        batch.front = start + advance
        if self.ragged is not None:
            batch.front[self.failed[sample]] = self.length

    def _residual(self, sample: np.ndarray, sizes: np.ndarray) -> None:
        self.residual[sample] = np.maximum(self.residual[sample], sizes.max(axis=1))
