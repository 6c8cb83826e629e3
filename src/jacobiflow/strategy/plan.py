"""`plan`: the fastest solver for each block of a flow, on a device and for a batch size and a tolerance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_count, check_flag, check_kind, check_positive
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, MOST_SAMPLES, draw_latents
from jacobiflow.progress import Progress
from jacobiflow.solvers import MaxSweeps, Sequential, Solution, Solver, Tolerance, Whole, solve, solve_certified
from jacobiflow.solvers.guess import Given
from jacobiflow.strategy.race import Race, candidates, time_exact, timed
from jacobiflow.strategy.rounding import above_rounding
from jacobiflow.strategy.strategy import Prediction, Strategy, device_name
from jacobiflow.strategy.tune import SAMPLES, Tuning, all_classes, find_tuning

_FEWEST = 2  # samples of a race: one may need twice as many sweeps as another
_SECONDS = 2.0  # in which several solvers run at each block; more if the exact loop takes long
_VERIFIED = 4  # samples that a plan is verified on
_EXACT = 0.01  # share of the tolerance to which sweeps count as exact
_COMPARED = 2  # of them, whose images are compared with those of the exact loop
_MARGIN = 0.03  # least gain over the exact loop, as a share
_TRIALS = 3  # of tolerances for the sweeps
_TIGHTER = 0.5  # of the tolerance that would just do
_LOOP = Solver(Sequential())


def plan(
    flow: ImageFlow, tuning: Tuning | None = None, batch_size: int = 16, tolerance: float = 1e-3,
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
        tolerance: Largest residual in any block, and largest error of an image.
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
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    tolerance = check_positive("tolerance", tolerance, "a positive number; at 0 use strategy 'sequential'")
    check_flag("bf16", bf16)
    strategy = make_plan(flow, tuning, batch_size, tolerance, bf16, progress)
    warn_if_raised(strategy, tolerance)
    return strategy


def make_plan(
    flow: ImageFlow, tuning: Tuning | None, batch_size: int, tolerance: float,
    bf16: bool = True, progress: Progress | None = None,
) -> Strategy:  # fmt: skip
    """`plan` without its checks and its warning."""
    if tuning is not None:
        tuning.check(flow)
    elif (file := find_tuning(flow)) is not None:
        tuning = Tuning.load(file)
        if tuning.fingerprint != fingerprint(flow):
            warnings.warn("the tuning in the flow's folder is of other weights, and is not used", stacklevel=4)
            tuning = None
    tolerance = above_rounding(flow, tolerance)
    return _Planner(flow, tuning, batch_size, tolerance, bf16, progress).plan()


def warn_if_raised(strategy: Strategy, tolerance: float) -> None:
    """Warns the caller's caller if a plan is for a larger tolerance than it was asked for."""
    if strategy.tolerance is not None and strategy.tolerance > tolerance:
        warnings.warn(
            f"tolerance {tolerance:g} is below the rounding of this flow's network: planned for "
            f"{strategy.tolerance:.1e}; a wider dtype allows a smaller one",
            stacklevel=3,
        )


class _Trial(NamedTuple):
    """Seconds and largest error of each block, and the tokens by the plan and by the exact loop."""

    seconds: tuple[float, ...]
    errors: tuple[float, ...]
    x: Float[Tensor, "n t c"]
    exact: Float[Tensor, "m t c"]


class _Planner:
    def __init__(
        self, flow: ImageFlow, tuning: Tuning | None, batch_size: int, tolerance: float,
        bf16: bool, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.flow, self.tuning, self.batch_size, self.tolerance = flow, tuning, batch_size, tolerance
        self.bf16, self.progress = bf16, progress
        self.blocks = flow.inverse_blocks

    def plan(self) -> Strategy:
        batches = -(-_FEWEST // self.batch_size)
        # A tuning has not seen these latents, and `sample` does not draw them.
        tokens, labels = self._latents(SAMPLES, batches * self.batch_size)
        last = self.flow.blocks[-1].permutation(tokens)[: self.batch_size]
        exact = time_exact(self.blocks[-1], last, None if labels is None else labels[: self.batch_size])
        if not self.bf16:
            exact = exact._replace(bf16=math.inf)
        loop = [_LOOP] * len(self.blocks)
        loop_seconds = (exact.loop,) * len(self.blocks)
        if exact.loop <= exact.least_iteration:
            return self._strategy(loop, loop_seconds, exact.loop, 0.0, exact.spread)
        race = Race(exact, self.batch_size, self.tolerance, max(_SECONDS, sum(loop_seconds) / 2))
        solvers, seconds = self._race(race, tokens, labels)
        spread = max([exact.spread, *race.spreads])
        enough = (1 - _MARGIN) * sum(loop_seconds)
        if sum(seconds) <= enough:
            solvers, seconds, error = self._verify(solvers, seconds, exact.loop)
            if sum(seconds) <= enough and error <= self.tolerance:
                return self._strategy(solvers, seconds, exact.loop, error, spread)
        return self._strategy(loop, loop_seconds, exact.loop, 0.0, spread)

    def _latents(self, first: int, num: int) -> tuple[Float[Tensor, "n t c"], Int[Tensor, " n"] | None]:
        """Tokens at which the last block is inverted, in raster order, and labels."""
        config = self.flow.config
        start = FIRST_CALIBRATION_LATENT + first
        latents = draw_latents(num, config.num_tokens, config.token_channels, start=start)
        return prior_tokens(self.flow, latents), all_classes(self.flow, num)

    def _race(
        self, race: Race, tokens: Float[Tensor, "n t c"], labels: Int[Tensor, " n"] | None
    ) -> tuple[list[Solver], list[float]]:
        """The winner of each block, and its seconds for a batch."""
        solvers, seconds = [_LOOP] * len(self.blocks), [race.exact.loop] * len(self.blocks)

        def solve_block(i: int, z: Tensor) -> Tensor:
            z = z.nan_to_num(0.0, 0.0, 0.0)  # a sample that overflowed goes on as zeros
            fitted = None if self.tuning is None else self.tuning.blocks[i]
            entrants = candidates(self.blocks[i], z.shape[1], self.tolerance, fitted, race.exact)
            winner = race.run(self.blocks[i], z, labels, entrants)
            self._note(len(self.blocks) - i, "timing solvers")
            if winner is None:
                return z if race.is_over or i == 0 else solve(self.blocks[i], z, _LOOP, labels, self.batch_size).x
            solvers[i], seconds[i] = winner.solver, winner.seconds * self.batch_size / len(z)
            return winner.x

        invert(self.flow, tokens, solve_block)
        return solvers, seconds

    def _verify(
        self, solvers: list[Solver], seconds: list[float], loop_seconds: float
    ) -> tuple[list[Solver], list[float], float]:
        """The solvers, continued until images are within the tolerance, their seconds, and the error of the images.

        All on latents of their own. The seconds of a batch of many samples are those of the race.
        """
        num = min(self.batch_size, _VERIFIED)
        tokens, labels = self._latents(SAMPLES + _FEWEST + self.batch_size, num)
        trial = self._try(solvers, loop_seconds, tokens, labels, compared=min(_COMPARED, num))
        exact, factors, error = trial.exact, [self._factor(error) for error in trial.errors], math.inf
        for _ in range(_TRIALS):
            if num == self.batch_size:
                is_slow = [second > loop_seconds for second in trial.seconds]
                solvers = [_LOOP if slow else solver for solver, slow in zip(solvers, is_slow, strict=True)]
                seconds = [min(second, loop_seconds) for second in trial.seconds]
            error = _largest((trial.x[: len(exact)] - exact)[torch.isfinite(exact)])
            if error <= self.tolerance:
                break
            if min(factors) == 1:
                factors = [self._factor(error)] * len(solvers)
            solvers = [_tighter(solver, factor) for solver, factor in zip(solvers, factors, strict=True)]
            trial = self._try(solvers, loop_seconds, tokens, labels)
            factors = [1.0]
        return solvers, seconds, error

    def _factor(self, error: float) -> float:
        """The share of the present tolerance of a solver whose error is to be within half of the plan's tolerance."""
        return 1.0 if error <= self.tolerance else _TIGHTER * self.tolerance / error

    def _try(
        self, solvers: Sequence[Solver], loop_seconds: float, tokens: Float[Tensor, "n t c"],
        labels: Int[Tensor, " n"] | None, compared: int = 0,
    ) -> _Trial:  # fmt: skip
        """Solves all blocks by the solvers, and the first few samples by the exact loop too."""
        num, seconds, errors = len(tokens), [0.0] * len(solvers), [0.0] * len(solvers)
        few = None if labels is None else labels[:compared].repeat(2)

        def solve_block(i: int, x: Tensor) -> Tensor:
            x = x.nan_to_num(0.0, 0.0, 0.0)
            z, exact = x[:num], x[num:]

            def run() -> Solution:
                return solve_certified(self.blocks[i], z, solvers[i], labels, tolerance=self.tolerance)

            seconds[i], solution = timed(run, z.device)
            if num == self.batch_size and seconds[i] > loop_seconds and solvers[i] != _LOOP:  # by chance, perhaps
                seconds[i] = min(seconds[i], timed(run, z.device)[0])
            if compared:  # at the same inputs, and at those of exact blocks before
                near = solution.x[:compared]
                answers = self._exact(
                    i, torch.cat((z[:compared], exact)), few, near.repeat(2, 1, 1), solvers[i], loop_seconds
                )
                errors[i] = _largest(near - answers[:compared])
                exact = answers[compared:]
            self._note(len(solvers) - i, "verifying")
            return torch.cat((solution.x, exact))

        x = invert(self.flow, torch.cat((tokens, tokens[:compared])), solve_block)
        return _Trial(tuple(seconds), tuple(errors), x[:num], x[num:])

    def _exact(
        self, i: int, z: Tensor, labels: Tensor | None, near: Tensor, solver: Solver, loop_seconds: float
    ) -> Tensor:
        """Solutions of a block: by sweeps from near ones to a small part of the tolerance, or by the exact loop."""
        further = Solver(Whole(), Given(near), Tolerance(_EXACT * self.tolerance), solver.correction)
        if solver != _LOOP and torch.isfinite(near).all():
            with suppress(TimeoutError):
                return solve(self.blocks[i], z, further, labels, time_limit=loop_seconds).x
        return solve(self.blocks[i], z, _LOOP, labels).x

    def _note(self, done: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, len(self.blocks), what)

    def _strategy(
        self, solvers: Sequence[Solver], seconds: Sequence[float], loop: float, error: float, spread: float
    ) -> Strategy:
        prediction = Prediction(
            device=device_name(self.flow.var.device),
            batch_size=self.batch_size,
            guidance=self.flow.guidance,
            seconds=sum(seconds),
            sequential_seconds=loop * len(self.blocks),
            error=error,
            spread=spread,
        )
        return Strategy(tuple(solvers), fingerprint(self.flow), float(self.tolerance), prediction)


def _largest(difference: Tensor) -> float:
    """The largest absolute entry; infinite if one is not finite."""
    return float(difference.abs().nan_to_num(math.inf, math.inf).max()) if difference.numel() else math.inf


def _tighter(solver: Solver, factor: float) -> Solver:
    """The solver with a share of its tolerance, or with more sweeps."""
    atol, count = solver.stopping.atol, solver.stopping.max_sweeps
    if factor >= 1 or solver == _LOOP:
        return solver
    if atol is not None:
        return replace(solver, stopping=Tolerance(factor * atol))
    assert isinstance(count, int)
    return replace(solver, stopping=MaxSweeps(count + math.ceil(-math.log10(factor))))
