"""The race between solvers for a block: real solves are timed, and the fastest solver is kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, supports
from jacobiflow.blocks.context import Context
from jacobiflow.fixed_point import (
    Latent,
    MaxSweeps,
    Partition,
    Plain,
    Sequential,
    Solver,
    Tolerance,
    Whole,
    certify,
    solve,
    solve_certified,
)
from jacobiflow.native import library_name
from jacobiflow.planner.fit import BlockTuning
from jacobiflow.utils.serialization import registered_pieces
from jacobiflow.utils.timing import time_call

_LEAST_SWEEPS = 4  # fewest sweeps of a block to the usual tolerances
_BF16_SWEEPS = 3  # more of them change nothing but bfloat16's rounding
_BF16_GAIN = 0.8  # a sweep in bfloat16 that takes a larger share of one in full precision is no gain
_INT16_RESIDUAL = 0.2  # largest residual of rounded weights, as a share of the tolerance
_NEAR = 1.1  # times within this factor of the least are measured again
_CHANGED = 0.23  # a leader whose time changes by a larger share from block to block does not tell about the others
_SHORT = 0.05  # seconds of a solve that is timed three times, not twice
_ENOUGH = 0.5  # seconds of timings of the exact loop
_MOST = 6  # timings of the exact loop
_FEW = 4  # samples that tell if bfloat16 is faster


class Exact(NamedTuple):
    """Seconds of the exact loop and of one network evaluation of all tokens, in one block.

    `bf16` is that of an evaluation in bfloat16, infinite if it is not faster. `int16` is that of the loop with weights
    of 16-bit integers, infinite if the block has none. `spread` is the share by which timings of the same thing differ.
    """

    loop: float
    evaluation: float
    bf16: float
    spread: float
    int16: float = math.inf

    @property
    def least_iteration(self) -> float:
        """Seconds that a solve with its certificate takes at least."""
        sweeps = min(_LEAST_SWEEPS * self.evaluation, _BF16_SWEEPS * self.bf16 + self.evaluation)
        return min(sweeps, self.int16) + self.evaluation


def time_exact(block: AffineBlock, z: Float[Tensor, "b t c"], labels: Context, bf16: bool = True) -> Exact:
    """Times the exact loop and network evaluations of a block. Native code is compiled before."""
    library_name()
    loop = _timings(lambda: solve(block, z, Solver(Sequential()), labels), z.device)
    evaluation = _timings(lambda: certify(block, z, z, labels), z.device)
    int16 = [math.inf]
    can_pay = min(loop) > 2 * min(evaluation)  # half the bytes save half of the loop at most
    if can_pay and block.sequential_inverse(z, labels, int16_weights=True) is not None:
        int16 = _timings(lambda: block.sequential_inverse(z, labels, int16_weights=True), z.device)
    exact = Exact(min(loop), min(evaluation), math.inf, max(_spread(loop), _spread(evaluation)), min(int16))
    is_tried = bf16 and z.shape[1] > 1 and supports(block, "has_bf16")  # one token needs no sweeps
    if not is_tried or exact.loop <= _BF16_SWEEPS * exact.evaluation:
        return exact
    few, of_few = z[:_FEW], labels[:_FEW]

    def sweep(bf16_sweeps: int) -> float:
        solver = Solver(stopping=MaxSweeps(1), bf16_sweeps=bf16_sweeps)
        return min(_timings(lambda: solve(block, few, solver, of_few), z.device, _SHORT))

    share = (sweep(3) - sweep(1)) / (2 * sweep(0))
    return exact._replace(bf16=share * exact.evaluation) if share < _BF16_GAIN else exact


def candidates(num_tokens: int, tolerance: float, tuning: BlockTuning | None, exact: Exact) -> list[Solver]:
    """The solvers that race against the exact loop: all tokens at once, and the candidates of every partition."""
    partitions: list[Partition] = [Whole()]
    for kind in registered_pieces(Partition).values():
        partitions += [p for p in kind.candidates(num_tokens) if p.stop(0, num_tokens) < num_tokens]
    guess, correction = (Latent(), Plain()) if tuning is None else (tuning.guess, tuning.correction)
    solvers = [Solver(partition, guess, Tolerance(tolerance), correction) for partition in partitions]
    if math.isfinite(exact.bf16):
        solvers += [replace(solver, bf16_sweeps=_BF16_SWEEPS) for solver in solvers]
    if exact.int16 + exact.evaluation < exact.loop:
        solvers.append(Solver(Sequential(), stopping=Tolerance(tolerance), int16_weights=True))
    return solvers


class Runner(NamedTuple):
    """A solver in the race: its timings, its answers, its sweeps of the slowest sample and its largest residual."""

    solver: Solver
    timings: tuple[float, ...]
    x: Float[Tensor, "b t c"]
    sweeps: int
    residual: float

    @property
    def seconds(self) -> float:
        """The shortest of its timings."""
        return min(self.timings)


@dataclass
class Race:
    """Races for the blocks of a flow that have one shape, one after the other in sampling order.

    A solver is abandoned once it is slower than the best one. The exact loop takes the same time in every block, so it
    is timed once. If the best one of the block before takes its time again, only those that came near it run. After a
    limit of time only the best one of the block before runs.

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
    _seconds: float = 0.0
    _last: dict[Hashable, float] = field(default_factory=dict)  # seconds in the last race, by kind of solver

    def run(
        self, block: AffineBlock, z: Float[Tensor, "b t c"], labels: Context, solvers: Sequence[Solver]
    ) -> Runner | None:
        """Finds the fastest of the `solvers` for a block; `None` if the exact loop is as fast."""
        if self.is_over:
            return None
        began = time.perf_counter()
        track = partial(self._solve, block, z, labels)
        loop = self.exact.loop * len(z) / self.batch_size
        runners: list[Runner] = []

        def limit() -> float:
            return _NEAR * min([loop, *(runner.seconds for runner in runners)])

        def start(solver: Solver) -> None:
            with suppress(TimeoutError):
                runner = track(solver, limit())
                if not solver.int16_weights or runner.residual <= _INT16_RESIDUAL * self.tolerance:
                    runners.append(runner)

        def expected(solver: Solver) -> float:
            return self._last.get(_kind(solver), math.inf)

        leader, *others = sorted(solvers, key=expected)
        start(leader)
        if any(math.isclose(runner.seconds, expected(leader), rel_tol=_CHANGED) for runner in runners):
            others = [solver for solver in others if _kind(solver) in self._last]
        for solver in () if self._is_late() else others:
            start(solver)
        for runner in list(runners):
            if runner.solver.partition == Whole():
                start(_counted(runner))
        near = [runner for runner in runners if runner.seconds <= limit()]
        if len(near) > 1 or loop < limit():
            near = [self._again(track, runner) for runner in near]
        # A solver that only its number of sweeps brought near runs again as well.
        self._last = {_kind(runner.solver): runner.seconds for runner in reversed(near)}
        self._seconds += time.perf_counter() - began
        faster = [runner for runner in near if runner.seconds < loop]
        return min(faster, key=lambda runner: runner.seconds, default=None)

    @property
    def is_over(self) -> bool:
        """True if no solver is left that could run."""
        return self._is_late() and not self._last

    def _is_late(self) -> bool:
        return self._seconds > self.time_limit

    def _again(self, track: Callable[[Solver, None], Runner], runner: Runner) -> Runner:
        """The runner with more timings."""
        others = [track(runner.solver, None).seconds for _ in range(2 if runner.seconds < _SHORT else 1)]
        runner = runner._replace(timings=(*runner.timings, *others))
        self.spreads.append(_spread(runner.timings))
        return runner

    def _solve(
        self, block: AffineBlock, z: Tensor, labels: Context, solver: Solver, time_limit: float | None
    ) -> Runner:
        """A timed solve with certificates, in batches; TimeoutError if it takes longer than the limit."""
        run = partial(
            solve_certified, block, z, solver, labels, batch_size=self.batch_size, tolerance=self.tolerance,
            time_limit=time_limit,
        )  # fmt: skip
        seconds, solution = time_call(run, z.device)
        sweeps, residual = int(solution.sample_sweeps.max()), float(solution.residual.max())
        return Runner(solver, (seconds,), solution.x, sweeps, residual)


def _timings(run: Callable[[], object], device: torch.device, enough: float = _ENOUGH) -> list[float]:
    """Seconds of several calls, or of one if it takes `enough`."""
    seconds: list[float] = []
    while sum(seconds) < enough and len(seconds) < _MOST:
        seconds.append(time_call(run, device)[0])
    return seconds


def _spread(timings: Sequence[float]) -> float:
    """By how much the median is above the least, as a share. The first timing, a warm-up, does not count."""
    later = timings[1:] or timings
    return statistics.median(later) / min(later) - 1


def _kind(solver: Solver) -> Hashable:
    """The part of a solver that the solvers of different blocks share."""
    return solver.partition, solver.bf16_sweeps, solver.int16_weights


def _counted(runner: Runner) -> Solver:
    """The solver that makes as many sweeps as the samples of a race needed, without the last one, which only tells."""
    solver = runner.solver
    return replace(solver, stopping=MaxSweeps(max(runner.sweeps - solver.bf16_sweeps - 1, 1)))
