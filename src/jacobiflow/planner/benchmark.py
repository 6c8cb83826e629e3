"""Timed solves of a block, and the choice of its solver among them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from jacobiflow.blocks.base import AttentionBlock, no_gradients
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point import Bf16Sweeps, Guess, Latent, Partition, Sequential, Solver, Whole
from jacobiflow.fixed_point.attempt import attempt
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import registered_pieces
from jacobiflow.fixed_point.solve import solve_problem
from jacobiflow.native import library_name
from jacobiflow.utils.timing import time_call

SEQUENTIAL = Solver(Sequential())
UNCERTIFIED = SolveOptions(certify=False)

_MIN_SWEEPS = 4
"""Sweeps that a block needs at least to the usual tolerances."""
_BF16_SWEEPS = 3
"""Sweeps in bfloat16 that come first; more would change nothing but the rounding of bfloat16."""
_MAX_BF16_SHARE = 0.8
"""An evaluation in bfloat16 counts as faster below this share of the time of one in full precision."""
_MAX_TIME_RATIO = 1.1
"""A solve is abandoned after this multiple of the best time so far: the first solve may take longer than later ones."""
_SHORT_SECONDS = 0.05
"""Seconds that the timings of a solve, or of evaluations in bfloat16, take together; a shorter call is repeated."""
_TIMING_SECONDS = 0.5
"""Seconds after which other calls in a block are not repeated."""
_MAX_TIMINGS = 6
"""The largest number of timings of a call."""
_NUM_BF16_SAMPLES = 4
"""Samples whose evaluation tells if bfloat16 is faster."""


class BlockTimings(NamedTuple):
    """Seconds that a batch takes in one block.

    Attributes:
        sequential: By the exact loop.
        evaluation: By one network evaluation of all tokens.
        bf16_evaluation: By an evaluation in bfloat16; infinite if it is not faster.
    """

    sequential: float
    evaluation: float
    bf16_evaluation: float = math.inf

    @property
    def can_iterate(self) -> bool:
        """Tells if another solver, with its certificate, can be faster than the exact loop."""
        sweeps = min(_MIN_SWEEPS * self.evaluation, _BF16_SWEEPS * self.bf16_evaluation + self.evaluation)
        return self.sequential > sweeps + self.evaluation


class TimedSolve(NamedTuple):
    """A solver, the seconds of its shortest solve with certificates, and its answers."""

    solver: Solver
    seconds: float
    x: Tokens


def time_block(problem: Problem, try_bf16: bool = True) -> BlockTimings:
    """Times the exact loop and network evaluations of a block."""
    library_name()  # Compiles native code first, which would else count.
    device = problem.z.device
    sequential = _time_repeatedly(partial(attempt, problem, SEQUENTIAL, UNCERTIFIED), device)
    evaluation = _time_repeatedly(partial(problem.residual, problem.z), device)
    timings = BlockTimings(min(sequential), min(evaluation))
    can_pay = timings.sequential > _BF16_SWEEPS * timings.evaluation
    if try_bf16 and can_pay and problem.num_tokens > 1 and isinstance(problem.block, AttentionBlock):
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


def candidates(num_tokens: int, timings: BlockTimings) -> list[Solver]:
    """Returns the solvers to time against the exact loop: all tokens at once, and the candidates of every partition."""
    partitions: list[Partition] = [Whole()]
    for kind in registered_pieces(Partition).values():
        partitions += [p for p in kind.candidates(num_tokens) if p.stop(0, num_tokens) < num_tokens]
    guesses: list[Guess] = (
        [Latent(), Bf16Sweeps(_BF16_SWEEPS)] if math.isfinite(timings.bf16_evaluation) else [Latent()]
    )
    return [Solver(partition, guess) for guess in guesses for partition in partitions]


def race(problem: Problem, solvers: Iterable[Solver], sequential: float, options: SolveOptions) -> TimedSolve | None:
    """Times solvers in a block, and abandons a solve that takes longer than the best one before.

    Returns the fastest; `None` if none is faster than the exact loop, which takes `sequential` seconds.
    """
    table = list[TimedSolve]()
    for solver in solvers:
        limit = _MAX_TIME_RATIO * min([sequential, *(row.seconds for row in table)])
        with suppress(TimeoutError):
            table.append(time_solve(problem, solver, options, limit))
    faster = [row for row in table if row.seconds < sequential]
    return min(faster, key=lambda row: row.seconds, default=None)


def time_solve(problem: Problem, solver: Solver, options: SolveOptions, limit: float) -> TimedSolve:
    """Times a solve with certificates, a short one several times. Raises TimeoutError after `limit` seconds."""
    solve, device = partial(solve_problem, problem, solver), problem.z.device
    limited = replace(options, deadline=time.perf_counter() + limit)
    seconds, solution = time_call(partial(solve, limited), device)
    others = _time_repeatedly(partial(solve, options), device, _SHORT_SECONDS - seconds)
    return TimedSolve(solver, min([seconds, *others]), solution.x)


def _time_repeatedly(
    run: Callable[[], object], device: torch.device, max_seconds: float = _TIMING_SECONDS
) -> list[float]:
    """Seconds of several calls, or of one if it takes `max_seconds`."""
    seconds: list[float] = []
    while sum(seconds) < max_seconds and len(seconds) < _MAX_TIMINGS:
        seconds.append(time_call(run, device)[0])
    return seconds
