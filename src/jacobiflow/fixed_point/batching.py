"""The loop of all sweeps: batches of samples are swept until all samples are finished."""

from __future__ import annotations

from typing import NamedTuple

from jacobiflow.blocks.base import AttentionBlock
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point.engine import SampleQueue, SweepBatch
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.own_fronts import OwnFronts
from jacobiflow.fixed_point.partition import SlidingRun
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.progress import SampleProgress
from jacobiflow.fixed_point.shared_front import SharedFront
from jacobiflow.fixed_point.solver import Solver, Stopping


class SweepResult(NamedTuple):
    """The last iterates and the progress of all samples in the caller's order, and the cost of their sweeps."""

    x: Tokens
    progress: SampleProgress
    sweeps: int
    token_evaluations: int


def sweep(problem: Problem, solver: Solver, options: SolveOptions, in_bf16: bool = False) -> SweepResult:
    """Sweeps all samples until their tokens are final; `in_bf16` runs the network in bfloat16."""
    max_change = None if options.tolerance is None else solver.tolerance_factor * options.tolerance
    start = solver.guess.start(problem, options)
    slides = isinstance(solver.partition, SlidingRun) and solver.stopping == Stopping()
    kind: type[SweepBatch] = OwnFronts if slides and isinstance(problem.block, AttentionBlock) else SharedFront
    queue, sweeps, token_evaluations = SampleQueue(problem, start.x), start.sweeps, start.token_evaluations
    while queue.has_waiting:
        batch = kind(queue, queue.take(options.batch_size or len(problem)), solver, max_change, in_bf16)
        while not batch.is_finished:
            options.check_time()
            batch.step()
            batch.exchange(queue)
        sweeps, token_evaluations = sweeps + batch.sweeps, token_evaluations + batch.token_evaluations
    queue.progress.sweeps += start.sample_sweeps
    return SweepResult(queue.x, queue.progress, sweeps, token_evaluations)
