"""`plan`: the fastest solver for each block of a flow, on a device and for a batch size and a tolerance."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from jacobiflow.blocks.base import FlowBlock
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point import Solver
from jacobiflow.fixed_point.attempt import attempt
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE, SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solve import solve_problem
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.planner.benchmark import SEQUENTIAL, UNCERTIFIED, BlockTimings, candidates, race, time_block
from jacobiflow.planner.strategy import Prediction, Strategy, device_name
from jacobiflow.utils.checks import check_count, check_flag, check_positive
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import time_call
from jacobiflow.utils.warn import warn_caller

_MIN_RACED = 2
"""The least number of samples in a race: one sample may need twice as many sweeps as another."""
_MIN_RACE_SECONDS = 2.0
"""The least number of seconds for races between several solvers."""
_NUM_VERIFIED = 4
"""Samples that a plan is verified on, and whose rounding is measured; a single one may have none."""
_NUM_COMPARED = 2
"""Verified samples whose images are compared with exact ones."""
_MAX_TIME_SHARE = 0.97
"""The largest share of the exact loop's time that a plan may take."""
_NUM_TRIALS = 3
"""The number of tolerances that a verification tries."""
_SAFETY_FACTOR = 0.5
"""The sweeps' tolerance is tightened to this share of the one that would be just enough."""
_ROUNDING_MARGIN = 2.0
"""The rounding of a few samples is taken to be within this factor of a batch's."""
_ROUNDED_DTYPES = ("bfloat16", "float16", "tf32")
"""Networks of other dtypes round so little that their rounding is not measured."""


def plan(
    flow: Flow, batch_size: int = 16, tolerance: float = DEFAULT_TOLERANCE, *, bf16: bool = True,
    progress: Progress | None = None,
) -> Strategy:  # fmt: skip
    """Finds the fastest solver for each block by timing real solves on this device.

    In each block the exact loop races against all tokens at once and the candidates of the registered partitions, each
    with sweeps in bfloat16 first if these are faster. The plan is then run on other latents: its images are within the
    tolerance of those of the exact loop. If no iteration can be faster than the exact loop, the exact loop is the plan
    at once.

    A network in bfloat16 or float16, or with TF32 products, rounds coarsely. A tolerance below its rounding is raised
    to it, with a warning; `Strategy.tolerance` is the raised one.

    Args:
        flow: The model, on the device to plan for, or a view of it under guidance (`flow.guided`).
        batch_size: Samples that are solved together.
        tolerance: Largest residual in any block, and largest error of a sample.
        bf16: Whether sweeps in bfloat16 may come first.
        progress: Is called after each block.

    Example:
        >>> strategy = jf.plan(jf.load("digits-p1"), batch_size=4)
        >>> strategy.tolerance
        0.001
    """
    check_flow(flow)
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    tolerance = check_positive("tolerance", tolerance, "a positive number; at 0 use strategy 'sequential'")
    check_flag("bf16", bf16)
    strategy = make_plan(flow, batch_size, tolerance, bf16, progress)
    warn_if_raised(strategy, tolerance)
    return strategy


class _Draft(NamedTuple):
    """A plan in the making: a solver per block, the seconds of a batch, the error of images."""

    solvers: tuple[Solver, ...]
    seconds: float
    error: float = 0.0


def make_plan(flow: Flow, batch_size: int, tolerance: float, bf16: bool, progress: Progress | None) -> Strategy:
    """Makes a plan as `plan` does, without its checks and its warning."""
    if flow.precision in _ROUNDED_DTYPES or torch.is_autocast_enabled(flow.var.device.type):
        tolerance = max(tolerance, _ROUNDING_MARGIN * rounding_floor(flow))
    timings = _time_blocks(flow, batch_size, bf16, progress)
    sequential_seconds = sum(each.sequential for each in timings)
    draft = _Draft((SEQUENTIAL,) * len(timings), sequential_seconds)
    if any(each.can_iterate for each in timings):
        raced = _race_blocks(flow, timings, batch_size, tolerance, progress)
        draft = _verify(flow, raced, _MAX_TIME_SHARE * sequential_seconds, batch_size, tolerance, progress) or draft
    prediction = Prediction(
        device=device_name(flow.var.device),
        batch_size=batch_size,
        guidance=flow.guidance,
        seconds=draft.seconds,
        sequential_seconds=sequential_seconds,
        error=draft.error,
    )
    return Strategy(draft.solvers, fingerprint(flow), float(tolerance), prediction)


def warn_if_raised(strategy: Strategy, tolerance: float) -> None:
    """Warns if a plan solves to a larger tolerance than it was asked for."""
    is_exact = all(solver == SEQUENTIAL for solver in strategy.solvers)
    if strategy.tolerance is not None and strategy.tolerance > tolerance and not is_exact:
        warn_caller(
            f"tolerance {tolerance:g} is below the rounding of this flow's network: planned for "
            f"{strategy.tolerance:.1e}; a wider dtype allows a smaller one"
        )


def rounding_floor(flow: Flow) -> float:
    """Measures the rounding of a network, below which no tolerance can be reached.

    It is the largest residual |g(x) - x| of the exact loop's answers in any block. If sweeps that stop at this residual
    leave images that differ more from those of the exact loop, it is that difference. Samples that overflow do not
    count.
    """
    tokens, context = _example_inputs(flow, 0, _NUM_VERIFIED)
    floor = 0.0

    def solve_block(i: int, z: Tokens) -> Tokens:
        """Solves the first half of the rows exactly, and the second half by sweeps."""
        nonlocal floor
        problem, other = (_block_problem(flow, i, half, context) for half in z.chunk(2))
        x = attempt(problem, SEQUENTIAL, UNCERTIFIED).x
        residual, _ = problem.residual(x)
        floor = max([floor, *residual[residual.isfinite()].tolist()])
        return torch.cat((x, attempt(other, Solver(), replace(UNCERTIFIED, tolerance=floor)).x))

    x, other_x = flow.map_blocks_reversed(tokens.repeat(2, 1, 1), solve_block).chunk(2)
    return max(floor, float((x - other_x).nan_to_num(0.0, 0.0, 0.0).abs().max()))


def _time_blocks(flow: Flow, batch_size: int, bf16: bool, progress: Progress | None) -> list[BlockTimings]:
    """The timings of each block; blocks of one shape are timed once."""
    tokens, context = _example_inputs(flow, 0, batch_size)
    shapes = [_parameter_shapes(block) for block in flow.blocks]
    last = {shape: i for i, shape in enumerate(shapes)}
    timings: dict[Hashable, BlockTimings] = {}
    for shape, i in reversed(last.items()):
        if progress is not None:
            progress(len(timings), len(last), "timing blocks")
        timings[shape] = time_block(Problem(flow.inverse_block(i), tokens, context), bf16)
    if progress is not None:
        progress(len(last), len(last), "timing blocks")
    return [timings[shape] for shape in shapes]


def _race_blocks(
    flow: Flow, timings: Sequence[BlockTimings], batch_size: int, tolerance: float, progress: Progress | None
) -> _Draft:
    """The fastest solver of each block."""
    options = SolveOptions(tolerance, batch_size=batch_size)
    tokens, context = _example_inputs(flow, 0, max(batch_size, _MIN_RACED))
    solvers, seconds = [SEQUENTIAL] * len(timings), [each.sequential for each in timings]
    shapes, num_tokens = [_parameter_shapes(block) for block in flow.blocks], flow.config.num_tokens
    remaining = {
        shape: candidates(num_tokens, each) if each.can_iterate else []
        for shape, each in zip(shapes, timings, strict=True)
    }
    end = time.perf_counter() + max(_MIN_RACE_SECONDS, sum(seconds) / 2)

    def solve_block(i: int, z: Tokens) -> Tokens:
        if not any(remaining.values()):
            return z  # No block is raced any more.
        problem, shape = _block_problem(flow, i, z, context), shapes[i]
        num_batches = len(problem) / batch_size
        winner = race(problem, remaining[shape], num_batches * timings[i].sequential, options)
        if winner is not None:
            solvers[i], seconds[i] = winner.solver, winner.seconds / num_batches
        if time.perf_counter() > end:
            remaining[shape] = [] if winner is None else [winner.solver]
        return attempt(problem, SEQUENTIAL, replace(options, certify=False)).x if winner is None else winner.x

    flow.map_blocks_reversed(tokens, solve_block, progress, "timing solvers")
    return _Draft(tuple(solvers), sum(seconds))


def _verify(
    flow: Flow, draft: _Draft, max_seconds: float, batch_size: int, tolerance: float, progress: Progress | None
) -> _Draft | None:
    """The draft, tightened until samples are within the tolerance, with its error; `None` if it is then too slow."""
    if draft.seconds > max_seconds:
        return None
    # The races have not seen these latents.
    num = min(batch_size, _NUM_VERIFIED)
    tokens, context = _example_inputs(flow, _MIN_RACED + batch_size, num)
    loops, compared = [SEQUENTIAL] * len(draft.solvers), slice(_NUM_COMPARED)
    exact = _solve_blocks(flow, loops, tokens[compared], context[compared], UNCERTIFIED, progress)
    factor = 1.0
    for _ in range(_NUM_TRIALS):
        run = partial(_solve_blocks, flow, draft.solvers, tokens, context, SolveOptions(tolerance), progress)
        seconds, x = time_call(run, tokens.device)
        if seconds > max_seconds and num == batch_size:  # The machine may have been busy.
            seconds, _ = time_call(run, tokens.device)
        error = _max_error(x[: len(exact)], exact)
        draft = _Draft(draft.solvers, seconds if num == batch_size else draft.seconds, error)
        if draft.seconds > max_seconds or math.isinf(error):
            return None
        if error <= tolerance:
            return draft
        factor *= _SAFETY_FACTOR * tolerance / error
        draft = draft._replace(solvers=tuple(replace(each, tolerance_factor=factor) for each in draft.solvers))
    return None


def _solve_blocks(
    flow: Flow, solvers: Sequence[Solver], x: Tokens, context: Context, options: SolveOptions,
    progress: Progress | None,
) -> Tokens:  # fmt: skip
    """The inverse of tokens."""

    def solve_block(i: int, z: Tokens) -> Tokens:
        return solve_problem(_block_problem(flow, i, z, context), solvers[i], options).x

    return flow.map_blocks_reversed(x, solve_block, progress, "verifying")


def _max_error(x: Tokens, exact: Tokens) -> float:
    """The largest difference from exact tokens, as far as these are finite; infinite if there is none."""
    difference = (x - exact)[exact.isfinite()].abs().nan_to_num(math.inf, math.inf)
    return max(difference.tolist(), default=math.inf)


def _block_problem(flow: Flow, i: int, z: Tokens, context: Context) -> Problem:
    """The problem of block i. Values that overflowed go on as zeros."""
    return Problem(flow.inverse_block(i), z.nan_to_num(0.0, 0.0, 0.0), context)


def _example_inputs(flow: Flow, first: int, num: int) -> tuple[Tokens, Context]:
    """Tokens at which the last block is inverted, in the order of the data, and a context. `sample` draws others."""
    config = flow.config
    latents = draw_latents(num, config.num_tokens, config.token_dim, start=FIRST_CALIBRATION_LATENT + first)
    return flow.prior_tokens(latents), flow.context_kind.example(num).to(flow.var.device)


def _parameter_shapes(block: FlowBlock) -> Hashable:
    """The shapes of the parameters: blocks that share them take the same time."""
    return tuple(parameter.shape for parameter in block.parameters())
