"""Timed solves of a block, and the choice of its solver from a table of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from jacobiflow.blocks.base import no_gradients, supports
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point import Latent, MaxSweeps, Partition, Plain, Sequential, Solver, Tolerance, Whole
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import registered_pieces
from jacobiflow.fixed_point.solve import attempt, solve_to_tolerance
from jacobiflow.native import library_name
from jacobiflow.planner.fit import BlockTuning
from jacobiflow.utils.timing import time_call

SEQUENTIAL = Solver(Sequential())
UNCERTIFIED = SolveOptions(certify=False)

_MIN_SWEEPS = 4
"""Sweeps that a block needs at least to the usual tolerances."""
_BF16_SWEEPS = 3
"""Sweeps in bfloat16 that come first; more would change nothing but the rounding of bfloat16."""
_MAX_BF16_SHARE = 0.8
"""An evaluation in bfloat16 counts as faster below this share of the time of one in full precision."""
_NEAR_FACTOR = 1.1
"""A solver is near the best up to this multiple of its time. Slower ones are abandoned, near ones timed again."""
_MAX_LEADER_CHANGE = 0.23
"""If the leader's time changes by at most this share, other solvers are assumed to compare as in the last race."""
_SHORT_SECONDS = 0.05
"""Solves that take fewer seconds are timed three times, not twice."""
_TIMING_SECONDS = 0.5
"""Seconds after which calls in a block are not repeated."""
_MAX_TIMINGS = 6
"""The largest number of timings of a call."""
_NUM_BF16_SAMPLES = 4
"""Samples whose evaluation tells if bfloat16 is faster."""


class BlockTimings(NamedTuple):
    """Seconds that a batch takes in one block.

    Attributes:
        sequential: By the exact loop.
        evaluation: By one network evaluation of all tokens.
        spread: The share by which timings of the same call differ.
        bf16_evaluation: By an evaluation in bfloat16; infinite if it is not faster.
    """

    sequential: float
    evaluation: float
    spread: float
    bf16_evaluation: float = math.inf

    @property
    def can_iterate(self) -> bool:
        """Tells if another solver, with its certificate, can be faster than the exact loop."""
        sweeps = min(_MIN_SWEEPS * self.evaluation, _BF16_SWEEPS * self.bf16_evaluation + self.evaluation)
        return self.sequential > sweeps + self.evaluation


class TimedSolve(NamedTuple):
    """A solver that was timed in a block.

    Attributes:
        solver: The solver.
        timings: Seconds of each of its solves, certificates included.
        x: Its answers.
        sweeps: Sweeps of the slowest sample.
    """

    solver: Solver
    timings: tuple[float, ...]
    x: Tokens
    sweeps: int

    @property
    def seconds(self) -> float:
        """The shortest of its timings."""
        return min(self.timings)


@dataclass(frozen=True)
class RaceState:
    """The results of races so far, in blocks of one shape.

    Attributes:
        seconds_left: Seconds for races between several solvers. Below 0 only the best solver runs.
        last: Seconds of the solvers that were near the best in the last race, by their `solver_key`.
        spread: The largest share by which timings of a solver differed.
    """

    seconds_left: float
    last: Mapping[Hashable, float] = field(default_factory=dict)
    spread: float = 0.0

    @property
    def is_over(self) -> bool:
        """True if no solver is left that may run."""
        return self.seconds_left < 0 and not self.last

    def expected_seconds(self, solver: Solver) -> float:
        """Returns the seconds of such a solver in the last race; infinite if it was not near the best."""
        return self.last.get(solver_key(solver), math.inf)

    def add_race(self, rows: Sequence[TimedSolve], seconds: float) -> RaceState:
        """Returns the state after a race that took `seconds`; `rows` are the solves that were near the best."""
        # Of two rows with the same key the first counts: it is the one that stops on a tolerance.
        last = {solver_key(row.solver): row.seconds for row in reversed(rows)}
        spread = max([self.spread, *(timing_spread(row.timings) for row in rows)])
        return RaceState(self.seconds_left - seconds, last, spread)


def time_block(problem: Problem, try_bf16: bool = True) -> BlockTimings:
    """Times the exact loop and network evaluations of a block."""
    library_name()  # Compiles native code first, which would else count.
    device = problem.z.device
    sequential = _time_repeatedly(partial(attempt, problem, SEQUENTIAL, UNCERTIFIED), device)
    evaluation = _time_repeatedly(partial(problem.residual, problem.z), device)
    spread = max(timing_spread(sequential), timing_spread(evaluation))
    timings = BlockTimings(min(sequential), min(evaluation), spread)
    can_pay = timings.sequential > _BF16_SWEEPS * timings.evaluation
    if try_bf16 and can_pay and problem.num_tokens > 1 and supports(problem.block, "has_bf16"):
        share = _bf16_share(problem[:_NUM_BF16_SAMPLES])
        if share < _MAX_BF16_SHARE:
            timings = timings._replace(bf16_evaluation=share * timings.evaluation)
    return timings


def _bf16_share(problem: Problem) -> float:
    """The time of an evaluation in bfloat16, as a share of that of one in full precision."""
    block: Any = problem.block
    z = problem.z
    with no_gradients(block):
        cache = block.init_cache(z, problem.context)
        bf16, full = (
            min(_time_repeatedly(partial(block.update, z, z, 0, problem.num_tokens, each), z.device, _SHORT_SECONDS))
            for each in (block.to_bf16(cache), cache)
        )
    return bf16 / full


def candidates(num_tokens: int, tolerance: float, tuning: BlockTuning | None, timings: BlockTimings) -> list[Solver]:
    """Returns the solvers to time against the exact loop: all tokens at once, and those of every partition."""
    partitions: list[Partition] = [Whole()]
    for kind in registered_pieces(Partition).values():
        partitions += [p for p in kind.candidates(num_tokens) if p.stop(0, num_tokens) < num_tokens]
    guess, correction = (Latent(), Plain()) if tuning is None else (tuning.guess, tuning.correction)
    solvers = [Solver(partition, guess, Tolerance(tolerance), correction) for partition in partitions]
    if math.isfinite(timings.bf16_evaluation):
        solvers += [replace(solver, bf16_sweeps=_BF16_SWEEPS) for solver in solvers]
    return solvers


def race(
    problem: Problem, solvers: Sequence[Solver], timings: BlockTimings, options: SolveOptions, state: RaceState
) -> tuple[TimedSolve | None, RaceState]:
    """Times solvers in a block. Returns the fastest, or `None` if the exact loop is as fast, and the new state.

    The best solver of the last race, in `state`, runs first. If it takes its time again, only those that came near it
    run. The exact loop takes the same time in every block of one shape, so `timings` are those of any such block.
    """
    if state.is_over:
        return None, state
    started = time.perf_counter()
    sequential = timings.sequential * len(problem) / (options.batch_size or len(problem))
    leader, *others = sorted(solvers, key=state.expected_seconds)
    table = _add_timed(problem, [leader], [], sequential, options)
    table = _add_timed(problem, select_rivals(others, table, state), table, sequential, options)
    table = _add_timed(problem, fix_sweeps(table), table, sequential, options)
    rows = select_near(table, sequential)
    if len(rows) > 1 or sequential < near_limit(table, sequential):
        rows = [_time_again(problem, row, options) for row in rows]
    return find_fastest(rows, sequential), state.add_race(rows, time.perf_counter() - started)


def time_solve(problem: Problem, solver: Solver, options: SolveOptions) -> TimedSolve:
    """Times a solve with certificates. Raises TimeoutError after the time limit of the options."""
    seconds, solution = time_call(partial(solve_to_tolerance, problem, solver, options), problem.z.device)
    return TimedSolve(solver, (seconds,), solution.x, int(solution.sample_sweeps.max()))


def near_limit(table: Iterable[TimedSolve], sequential: float) -> float:
    """Returns the seconds up to which a solver is near the best. `sequential` are those of the exact loop."""
    return _NEAR_FACTOR * min([sequential, *(row.seconds for row in table)])


def select_near(table: Sequence[TimedSolve], sequential: float) -> list[TimedSolve]:
    """Returns the solvers that are near the best."""
    return [row for row in table if row.seconds <= near_limit(table, sequential)]


def find_fastest(table: Iterable[TimedSolve], sequential: float) -> TimedSolve | None:
    """Returns the fastest solver; `None` if none is faster than the exact loop."""
    faster = [row for row in table if row.seconds < sequential]
    return min(faster, key=lambda row: row.seconds, default=None)


def select_rivals(others: Sequence[Solver], table: Sequence[TimedSolve], state: RaceState) -> Sequence[Solver]:
    """Returns the solvers to time after the leader of the last race, whose row `table` has unless it was too slow.

    If the leader takes its time again, these are the solvers that came near it. After the time limit there are none.
    """
    if state.seconds_left < 0:
        return ()
    is_repeated = any(
        math.isclose(row.seconds, state.expected_seconds(row.solver), rel_tol=_MAX_LEADER_CHANGE) for row in table
    )
    return [solver for solver in others if solver_key(solver) in state.last] if is_repeated else others


def fix_sweeps(table: Iterable[TimedSolve]) -> list[Solver]:
    """Returns solvers of all tokens at once that make a fixed number of sweeps: as many as the slowest sample took.

    The last sweep is left out, since it only confirms that the samples converged.
    """
    return [
        replace(row.solver, stopping=MaxSweeps(max(row.sweeps - row.solver.bf16_sweeps - 1, 1)))
        for row in table
        if row.solver.partition == Whole()
    ]


def solver_key(solver: Solver) -> Hashable:
    """Returns the part of a solver that solvers of different blocks have in common."""
    return solver.partition, solver.bf16_sweeps


def timing_spread(timings: Sequence[float]) -> float:
    """Returns the share by which the median is above the least. The first timing, a warm-up, does not count."""
    later = timings[1:] or timings
    return statistics.median(later) / min(later) - 1


def _add_timed(
    problem: Problem, solvers: Iterable[Solver], table: list[TimedSolve], sequential: float, options: SolveOptions
) -> list[TimedSolve]:
    """The table with a row for each solver that is near the best."""
    for solver in solvers:
        with suppress(TimeoutError):
            limit = near_limit(table, sequential)
            table = [*table, time_solve(problem, solver, replace(options, time_limit=limit))]
    return table


def _time_again(problem: Problem, row: TimedSolve, options: SolveOptions) -> TimedSolve:
    repeats = 2 if row.seconds < _SHORT_SECONDS else 1
    others = [time_solve(problem, row.solver, options).seconds for _ in range(repeats)]
    return row._replace(timings=(*row.timings, *others))


def _time_repeatedly(
    run: Callable[[], object], device: torch.device, max_seconds: float = _TIMING_SECONDS
) -> list[float]:
    """Seconds of several calls, or of one if it takes `max_seconds`."""
    seconds: list[float] = []
    while sum(seconds) < max_seconds and len(seconds) < _MAX_TIMINGS:
        seconds.append(time_call(run, device)[0])
    return seconds
