"""`plan`: the fastest solver for each block of a flow, on a device and for a batch size and a tolerance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import AffineBlock, FlowBlock
from jacobiflow.blocks.context import Context
from jacobiflow.fixed_point import MaxSweeps, Sequential, Solver, Tolerance, certify, solve, solve_certified
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.planner.benchmark import Exact, Race, candidates, time_exact
from jacobiflow.planner.fit import SAMPLES, Tuning, find_tuning
from jacobiflow.planner.strategy import Prediction, Strategy, device_name
from jacobiflow.utils.checks import check_count, check_flag, check_kind, check_positive
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import time_call

_FEWEST = 2  # samples of a race: one may need twice as many sweeps as another
_SECONDS = 2.0  # least time limit of a race between several solvers
_VERIFIED = 4  # samples that a plan is verified on; and from which rounding is measured, since one may have none
_COMPARED = 2  # verified samples whose images are compared with exact ones
_EXACT = 0.01  # share of the tolerance to which sweeps count as exact
_GAIN = 0.97  # largest share of the exact loop's time that a plan may take
_TRIALS = 3  # tolerances that a verification tries
_TIGHTER = 0.5  # safety factor of a tolerance that is tightened
_ROUNDING_MARGIN = 2.0  # the rounding of a few samples is taken to be within this factor of a batch's
_COARSE = ("bfloat16", "float16", "tf32")  # networks of other dtypes round so little that it is not measured
_LOOP = Solver(Sequential())


def plan(
    flow: Flow, tuning: Tuning | None = None, batch_size: int = 16, tolerance: float = DEFAULT_TOLERANCE,
    *, bf16: bool = True, progress: Progress | None = None,
) -> Strategy:  # fmt: skip
    """Finds the fastest solver for each block by timing real solves on this device.

    In each block the exact loop races against all tokens at once and the candidates of the registered partitions, each
    with sweeps in bfloat16 first if these are faster, and with the guess and the correction of a tuning. The plan is
    then run on latents of its own: its images are within the tolerance of those of the exact loop. If no iteration can
    be faster than the exact loop, that is the plan at once.

    A network in bfloat16 or float16, or with TF32 products, rounds coarsely. A tolerance below its rounding is raised
    to it, with a warning; `Strategy.tolerance` is the raised one.

    Args:
        flow: The model, on the device to plan for, or a view of it under guidance (`flow.guided`).
        tuning: By default that of the model folder (`jacobiflow.find_tuning`), if it is of the flow's weights.
        batch_size: Samples that are solved together.
        tolerance: Largest residual in any block, and largest error of a sample.
        bf16: Whether sweeps in bfloat16 may come first.
        progress: Is called after each block.

    Raises:
        ValueError: If the tuning is of another flow.

    Example:
        >>> strategy = jf.plan(jf.load("digits-p1"), batch_size=4)
        >>> strategy.tolerance
        0.001
    """
    check_flow(flow)
    check_kind("tuning", tuning, Tuning | None, "a Tuning, as tune returns, or None")
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    tolerance = check_positive("tolerance", tolerance, "a positive number; at 0 use strategy 'sequential'")
    check_flag("bf16", bf16)
    if tuning is not None:
        tuning.check(flow)
    strategy = make_plan(flow, tuning, batch_size, tolerance, bf16, progress)
    warn_if_raised(strategy, tolerance)
    return strategy


def make_plan(
    flow: Flow, tuning: Tuning | None, batch_size: int, tolerance: float,
    bf16: bool, progress: Progress | None,
) -> Strategy:  # fmt: skip
    """`plan` without its checks and its warning."""
    if tuning is None and (file := find_tuning(flow)) is not None:
        tuning = Tuning.load(file)
        if tuning.fingerprint != fingerprint(flow):
            warnings.warn("the tuning in the flow's folder is of other weights, and is not used", stacklevel=3)
            tuning = None
    if flow.precision in _COARSE or torch.is_autocast_enabled(flow.var.device.type):
        tolerance = max(tolerance, _ROUNDING_MARGIN * rounding_floor(flow))
    return _Planner(flow, tuning, batch_size, tolerance, bf16, progress).plan()


def warn_if_raised(strategy: Strategy, tolerance: float) -> None:
    """Warns the caller's caller if a plan solves to a larger tolerance than it was asked for."""
    is_exact = all(solver == _LOOP for solver in strategy.solvers)
    if strategy.tolerance is not None and strategy.tolerance > tolerance and not is_exact:
        warnings.warn(
            f"tolerance {tolerance:g} is below the rounding of this flow's network: planned for "
            f"{strategy.tolerance:.1e}; a wider dtype allows a smaller one",
            stacklevel=3,
        )


def rounding_floor(flow: Flow) -> float:
    """Measures the rounding of a network, below which no tolerance can be reached.

    The larger of the largest residual |g(x) - x| of the exact loop's answers, over the blocks, and the largest
    difference between its images and those of sweeps that stop at this residual. Samples that overflow do not count.
    """
    tokens, labels = _latents(flow, 0, _VERIFIED)
    blocks, largest = flow.inverse_blocks, 0.0

    def solve_block(i: int, z: Tensor) -> Tensor:
        nonlocal largest
        z, other = _or_zero(z).chunk(2)
        exact = solve(blocks[i], z, _LOOP, labels).x
        residual = certify(blocks[i], z, exact, labels)
        largest = max([largest, *residual[residual.isfinite()].tolist()])
        return torch.cat((exact, solve(blocks[i], other, Solver(stopping=Tolerance(largest)), labels).x))

    exact, iterated = flow.map_blocks_reversed(tokens.repeat(2, 1, 1), solve_block).chunk(2)
    return max(largest, float(_or_zero(exact - iterated).abs().max()))


def _latents(flow: Flow, first: int, num: int) -> tuple[Float[Tensor, "n t c"], Context]:
    """Tokens at which the last block is inverted, in the order of the data, and a context."""
    config = flow.config
    latents = draw_latents(num, config.num_tokens, config.token_channels, start=FIRST_CALIBRATION_LATENT + first)
    return flow.prior_tokens(latents), flow.example_context(num).to(flow.var.device)


def _or_zero(x: Tensor) -> Tensor:
    """Zeros in place of values that overflowed, so that a plan can go on."""
    return torch.where(x.isfinite(), x, torch.zeros_like(x))


@dataclass
class _Planner:
    flow: Flow
    tuning: Tuning | None
    batch_size: int
    tolerance: float
    bf16: bool
    progress: Progress | None

    def plan(self) -> Strategy:
        size, latents = self.batch_size, _latents(self.flow, SAMPLES, self.batch_size)
        by_shape: dict[Hashable, Exact] = {}
        for block, inverse in zip(reversed(self.flow.blocks), reversed(self.flow.inverse_blocks), strict=True):
            if _shape(block) not in by_shape:
                by_shape[_shape(block)] = time_exact(inverse, *latents, self.bf16)
        loops = [by_shape[_shape(block)].loop for block in self.flow.blocks]
        loop_seconds, spread, plan = sum(loops), max(exact.spread for exact in by_shape.values()), None
        limit = max(_SECONDS, loop_seconds / 2)
        races = {
            shape: Race(exact, size, self.tolerance, limit)
            for shape, exact in by_shape.items()
            if exact.loop > exact.least_iteration
        }
        if races:
            plan = self._verified(*self._race(races, loops), loops)
            spread = max([spread, *(value for race in races.values() for value in race.spreads)])
        solvers, seconds, error = plan or ([_LOOP] * len(loops), loop_seconds, 0.0)
        prediction = Prediction(
            device=device_name(self.flow.var.device),
            batch_size=size,
            guidance=self.flow.guidance,
            seconds=seconds,
            sequential_seconds=loop_seconds,
            error=error,
            spread=spread,
        )
        return Strategy(tuple(solvers), fingerprint(self.flow), float(self.tolerance), prediction)

    def _race(self, races: Mapping[Hashable, Race], loops: Sequence[float]) -> tuple[list[Solver], float]:
        """The winner of each block, and their seconds for a batch. Blocks of a shape share a race.

        `loops` are the seconds of the exact loop in each block.
        """
        # A tuning has not seen these latents, and `sample` does not draw them.
        tokens, labels = _latents(self.flow, SAMPLES, max(self.batch_size, _FEWEST))
        solvers, seconds = [_LOOP] * len(self.flow.blocks), 0.0

        def solve_block(i: int, block: AffineBlock, z: Tensor) -> Tensor:
            nonlocal seconds
            fitted = None if self.tuning is None else self.tuning.blocks[i]
            race, winner = races.get(_shape(self.flow.blocks[i])), None
            if race is not None:
                entrants = candidates(self.flow.config.num_tokens, self.tolerance, fitted, race.exact)
                winner = race.run(block, z, labels, entrants)
            if winner is None:
                seconds += loops[i]
                are_over = all(other.is_over for other in races.values())
                return z if are_over else solve(block, z, _LOOP, labels, batch_size=self.batch_size).x
            solvers[i] = winner.solver
            seconds += winner.seconds * self.batch_size / len(z)
            return winner.x

        self._invert(tokens, solve_block, "timing solvers")
        return solvers, seconds

    def _verified(
        self, solvers: list[Solver], seconds: float, loops: Sequence[float]
    ) -> tuple[list[Solver], float, float] | None:
        """The solvers, tightened until samples are within the tolerance, their seconds, and the error of the samples.

        `None` if they take too long for that, or are no nearer. On latents of their own; `loops` are the seconds of the
        exact loop in each block.
        """
        enough, num = _GAIN * sum(loops), min(self.batch_size, _VERIFIED)
        if seconds > enough:
            return None
        tokens, labels = _latents(self.flow, SAMPLES + _FEWEST + self.batch_size, num)
        few = labels[:_COMPARED]

        def solve_exactly(i: int, block: AffineBlock, z: Tensor) -> Tensor:
            closer = replace(solvers[i], stopping=Tolerance(_EXACT * self.tolerance), bf16_sweeps=0)
            with suppress(TimeoutError):
                return solve(block, z, closer, few, time_limit=loops[i]).x
            return solve(block, z, _LOOP, few).x

        def solve_block(i: int, block: AffineBlock, z: Tensor) -> Tensor:
            solution = solve_certified(block, z, solvers[i], labels, tolerance=self.tolerance)
            if solvers[i].int16_weights:
                residuals[i] = float(solution.residual.max())
            return solution.x

        residuals = [0.0] * len(solvers)
        exact = self._invert(tokens[:_COMPARED], solve_exactly, "verifying")
        run = partial(self._invert, tokens, solve_block, "verifying")
        for _ in range(_TRIALS):
            elapsed, x = time_call(run, tokens.device)
            if num == self.batch_size:
                seconds = elapsed if elapsed <= enough else time_call(run, tokens.device)[0]
            difference = (x[: len(exact)] - exact)[exact.isfinite()].abs().nan_to_num(math.inf, math.inf)
            error = max(difference.tolist(), default=math.inf)
            if seconds > enough or math.isinf(error):
                return None
            if error <= self.tolerance:
                return solvers, seconds, error
            factor = _TIGHTER * self.tolerance / error
            rounded = [i for i, solver in enumerate(solvers) if solver.int16_weights]
            worst = max(rounded, key=lambda i: residuals[i], default=None)
            solvers = [_LOOP if i == worst else _tighter(solver, factor) for i, solver in enumerate(solvers)]
        return None

    def _invert(
        self, tokens: Float[Tensor, "n t c"], solve_block: Callable[[int, AffineBlock, Tensor], Tensor], what: str
    ) -> Float[Tensor, "n t c"]:
        blocks = self.flow.inverse_blocks

        def solve_and_note(i: int, z: Tensor) -> Tensor:
            x = solve_block(i, blocks[i], _or_zero(z))
            if self.progress is not None:
                self.progress(len(blocks) - i, len(blocks), what)
            return x

        return self.flow.map_blocks_reversed(tokens, solve_and_note)


def _shape(block: FlowBlock) -> Hashable:
    """The shapes of the parameters: blocks that share them take the same time."""
    return tuple(parameter.shape for parameter in block.parameters())


def _tighter(solver: Solver, factor: float) -> Solver:
    """The solver with a share of its tolerance, or with more sweeps."""
    atol, count = solver.stopping.atol, solver.stopping.max_sweeps
    if atol is not None:
        return replace(solver, stopping=Tolerance(factor * atol))
    assert isinstance(count, int)
    return replace(solver, stopping=MaxSweeps(count + math.ceil(-math.log10(factor))))
