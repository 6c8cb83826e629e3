"""The race between solvers for a block: real solves are timed, and the fastest solver is kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.codec import registered
from jacobiflow.flows.base import AffineBlock, supports
from jacobiflow.measuring import synchronize
from jacobiflow.native import library_name
from jacobiflow.solvers import (
    Latent,
    MaxSweeps,
    Partition,
    Plain,
    Sequential,
    Solution,
    Solver,
    Tolerance,
    Whole,
    certify,
    solve,
    solve_certified,
)
from jacobiflow.strategy.tune import BlockTuning

T = TypeVar("T")

_LEAST_SWEEPS = 4  # that a block takes to the usual tolerances
_BF16_SWEEPS = 3  # more of them change nothing but bfloat16's rounding
_BF16_GAIN = 0.8  # a sweep in bfloat16 that takes a larger share of one in full precision is no gain
_NEAR = 1.1  # times within this factor of the least are measured again
_CHANGED = 1.3  # a leader whose time changes by this factor from block to block no longer tells about the others
_ROUNDS = 3  # of timings, if these are short
_SHORT, _LONG = 0.05, 0.3  # seconds of a solve that is timed several times, and of one that is timed once
_FEW = 4  # samples that tell if bfloat16 is faster
_FULL_RACES = 2  # blocks in which all candidates run


class Exact(NamedTuple):
    """Seconds of the exact loop and of one network evaluation of all tokens, in one block.

    `bf16` is that of an evaluation in bfloat16, infinite if there is none. `spread` is the share by which timings of
    the same thing differ.
    """

    loop: float
    evaluation: float
    bf16: float
    spread: float

    @property
    def least_iteration(self) -> float:
        """Seconds that sweeps and their certificate take at least."""
        sweeps = _LEAST_SWEEPS * self.evaluation
        if self.has_fast_bf16:
            sweeps = min(sweeps, _BF16_SWEEPS * self.bf16 + self.evaluation)
        return sweeps + self.evaluation

    @property
    def has_fast_bf16(self) -> bool:
        """True if sweeps in bfloat16 are faster."""
        return self.bf16 < _BF16_GAIN * self.evaluation


def time_exact(block: AffineBlock, z: Float[Tensor, "b t c"], labels: Int[Tensor, " b"] | None) -> Exact:
    """Times the exact loop and network evaluations of a block. Native code is compiled before."""
    library_name()
    loop = _timings(lambda: solve(block, z, Solver(Sequential()), labels), z.device)
    evaluation = _timings(lambda: certify(block, z, z, labels), z.device)
    exact = Exact(min(loop), min(evaluation), math.inf, max(_spread(loop), _spread(evaluation)))
    if not supports(block, "has_bf16") or exact.loop <= _BF16_SWEEPS * exact.evaluation:
        return exact
    few, of_few = z[:_FEW], None if labels is None else labels[:_FEW]

    def sweep(bf16_sweeps: int) -> float:
        solver = Solver(stopping=MaxSweeps(1), bf16_sweeps=bf16_sweeps)
        first = timed(lambda: solve(block, few, solver, of_few), z.device)[0]
        return first if first > _SHORT else min(first, timed(lambda: solve(block, few, solver, of_few), z.device)[0])

    one, two, four = sweep(0), sweep(1), sweep(3)
    return exact._replace(bf16=exact.evaluation * max(four - two, 0.0) / (2 * one))


def candidates(
    block: AffineBlock, num_tokens: int, tolerance: float, tuning: BlockTuning | None, exact: Exact
) -> list[Solver]:
    """The solvers that race against the exact loop: all tokens at once, and the candidates of every partition."""
    partitions: list[Partition] = [Whole()]
    for kind in registered(Partition).values():
        partitions += [p for p in kind.candidates(num_tokens) if p.stop(0, num_tokens) < num_tokens]
    guess, correction = (Latent(), Plain()) if tuning is None else (tuning.guess, tuning.correction)
    solvers = [Solver(partition, guess, Tolerance(tolerance), correction) for partition in partitions]
    if exact.has_fast_bf16:
        solvers += [replace(solver, bf16_sweeps=_BF16_SWEEPS) for solver in solvers]
    return solvers


class Runner(NamedTuple):
    """A solver in the race: its timings, its answers, and the sweeps of the slowest sample."""

    solver: Solver
    timings: tuple[float, ...]
    x: Float[Tensor, "b t c"]
    sweeps: int

    @property
    def seconds(self) -> float:
        """The shortest of its timings."""
        return min(self.timings)


@dataclass
class Race:
    """Races for the blocks of a flow, one after the other in sampling order.

    A solver is abandoned once it is slower than the best one. The exact loop takes the same time in every block, so it
    is timed once. In the first two blocks all candidates run; later only those that came near the best, unless the time
    of the best one changes. After a limit of time only the best one of the block before runs.

    Attributes:
        exact: Times of the exact loop and of network evaluations.
        batch_size: Samples that are solved together.
        tolerance: Largest residual of a solution.
        time_limit: Seconds for races in which several solvers run.
        spreads: By how much timings of the same solver differ, as shares.
    """

    exact: Exact
    batch_size: int
    tolerance: float
    time_limit: float
    spreads: list[float] = field(default_factory=list)
    _full_races: int = 0
    _seconds: float = 0.0
    _last: dict[Hashable, float] = field(default_factory=dict)  # seconds in the last race, by kind of solver

    def run(
        self, block: AffineBlock, z: Float[Tensor, "b t c"], labels: Int[Tensor, " b"] | None, solvers: Sequence[Solver]
    ) -> Runner | None:
        """Finds the fastest of the `solvers` for a block; `None` if the exact loop is as fast."""
        began = time.perf_counter()
        track = _Track(block, z, labels, self.batch_size, self.tolerance)
        loop = self.exact.loop * -(-len(z) // self.batch_size)
        runners: list[Runner] = []

        def start(solver: Solver) -> Runner | None:
            best = min([loop, *(runner.seconds for runner in runners)])
            runner = track.run(solver, best if best > _LONG else _NEAR * best)
            if runner is not None:
                runners.append(runner)
            return runner

        for solver in self._entrants(solvers, start):
            start(solver)
        for runner in list(runners):
            if runner.solver.partition == Whole():
                start(_counted(runner))
        best = min([loop, *(runner.seconds for runner in runners)])
        runners = [runner for runner in runners if runner.seconds <= _NEAR * best]
        if len(runners) > 1 or (runners and loop < _NEAR * best):
            runners = [self._again(track, runner, best) for runner in runners]
        self._last = {_kind(runner.solver): runner.seconds for runner in runners}
        self._seconds += time.perf_counter() - began
        winner = min(runners, key=lambda runner: runner.seconds, default=None)
        return winner if winner is not None and winner.seconds < loop else None

    @property
    def is_over(self) -> bool:
        """True if no solver is left that could run."""
        return self._seconds > self.time_limit and not self._last

    def _entrants(self, solvers: Sequence[Solver], start: Callable[[Solver], Runner | None]) -> Sequence[Solver]:
        """The solvers to run after the leader, which is started: all, or those that came near the best before."""
        if self.is_over:
            return ()
        leader, *others = sorted(solvers, key=lambda solver: self._last.get(_kind(solver), math.inf))
        expected, runner = self._last.get(_kind(leader)), start(leader)
        if self._seconds > self.time_limit:
            return ()
        if runner is not None and expected is not None:
            is_full = not expected / _CHANGED < runner.seconds < expected * _CHANGED
        else:
            is_full = runner is not None or expected is not None  # the exact loop has won or lost its place
        if is_full or self._full_races < _FULL_RACES:
            self._full_races += 1
            return others
        return [solver for solver in others if _kind(solver) in self._last]

    def _again(self, track: _Track, runner: Runner, best: float) -> Runner:
        """The runner with more timings, of which the first, a warm-up, does not count for the spread."""
        for _ in range(_ROUNDS - 1 if best < _SHORT else 1):
            other = track.run(runner.solver, 2 * _NEAR * best)
            if other is not None:
                runner = runner._replace(timings=(*runner.timings, *other.timings))
        self.spreads.append(_spread(runner.timings))
        return runner


class _Track(NamedTuple):
    """A block with latents, on which solvers run."""

    block: AffineBlock
    z: Tensor
    labels: Tensor | None
    batch_size: int
    tolerance: float

    def run(self, solver: Solver, time_limit: float) -> Runner | None:
        """A timed solve with certificates; `None` if it takes longer than the limit."""
        parts, seconds, sweeps = [], 0.0, 0
        for first in range(0, len(self.z), self.batch_size):
            rows = slice(first, first + self.batch_size)
            remaining = time_limit - seconds
            if remaining <= 0:
                return None
            try:
                spent, solution = timed(partial(self._solve, solver, rows, remaining), self.z.device)
            except TimeoutError:
                return None
            seconds += spent
            sweeps = max(sweeps, int(solution.sample_sweeps.max()))
            parts.append(solution.x)
        return Runner(solver, (seconds,), torch.cat(parts), sweeps) if seconds <= time_limit else None

    def _solve(self, solver: Solver, rows: slice, time_limit: float) -> Solution:
        labels = None if self.labels is None else self.labels[rows]
        return solve_certified(
            self.block, self.z[rows], solver, labels, tolerance=self.tolerance, time_limit=time_limit
        )


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of a call and its result. Waits for work that is queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def _timings(run: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of several calls, or of one if it is long."""
    seconds = [timed(run, device)[0]]
    while max(seconds) < _LONG and (len(seconds) < _ROUNDS or (sum(seconds) < _LONG and len(seconds) < 2 * _ROUNDS)):
        seconds.append(timed(run, device)[0])
    return seconds


def _spread(timings: Sequence[float]) -> float:
    """By how much the median is above the least, as a share. The first timing, a warm-up, does not count."""
    return statistics.median(timings[1:]) / min(timings[1:]) - 1 if len(timings) > 2 else 0.0


def _kind(solver: Solver) -> Hashable:
    """The part of a solver that the solvers of different blocks share."""
    return solver.partition, solver.bf16_sweeps, solver.stopping.atol is None


def _counted(runner: Runner) -> Solver:
    """The solver that makes as many sweeps as the samples of a race needed, without the last one, which only tells."""
    solver = runner.solver
    return replace(solver, stopping=MaxSweeps(max(runner.sweeps - solver.bf16_sweeps - 1, 1)))
