"""Choose, for a device, a batch size and a tolerance, the cheapest way to solve every block."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from jacobiflow.calibration.report import Report
from jacobiflow.calibration.tuning import Tuning
from jacobiflow.checks import check_count, check_device, check_flag, check_kind, check_positive
from jacobiflow.errors import InputValueError
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.precision import precision
from jacobiflow.guidance import Guidance, check_guidance, guided, in_force
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, MOST_SAMPLES, draw_latents
from jacobiflow.solvers import Sequential, Solution, Solver, Tolerance, Whole, certify, solve
from jacobiflow.strategy.costs import MOST_SECONDS, REPEATS, Costs, ExactCosts, exact_costs, measure
from jacobiflow.strategy.options import Option, PlanSettings, block_options, cheapest, combined
from jacobiflow.strategy.strategy import Prediction, Strategy, device_name

_ROUNDING = 2.0  # the rounding of a few samples is taken to be within this factor of a batch's
_FEW = 4  # of them: that of one may be a quarter of another's, or none


def plan(
    flow: ImageFlow, report: Report | Tuning, batch_size: int = 1, tolerance: float = 1e-3,
    device: torch.device | str | None = None, guidance: Guidance | None = None, *, progress: bool = True,
    settings: PlanSettings = PlanSettings(),  # noqa: B008  frozen
) -> Strategy:  # fmt: skip
    """The strategy with the least predicted time for a batch whose images are to be within `tolerance`.

    Seconds of a sweep are measured on the device, for the partitions of the tuning and a few numbers of rows. A batch
    of B samples, whose sweeps are distributed as the tuning found them, takes the sum of its sweeps' seconds, finished
    samples having left, and a pass for its certificates, which the loop does not need. An image's error is made of the
    blocks' errors, times amplification; see `combined`. Of all combinations of a way per block, token by token
    included, the cheapest within the tolerance is found exactly. Under another guidance than the tuning's, sweeps are
    taken to be as many, and only what stops on a tolerance is chosen.

    Where the loop of a block takes no longer than the two passes that any iteration needs, it is the plan at once.

    The choice is then tried, beside the sequential loop, on a batch that the tuning has not seen. If its images are not
    within the tolerance, the choice is made again for a smaller one; blocks that the loop solves sooner are left to the
    loop. The plan predicts what the trial took. It is the loop throughout unless it gains more than a few per cent.

    A network in bfloat16 or float16, or with TF32 products, rounds coarsely. A tolerance below its rounding, which is
    measured on four samples, is raised to it, with a warning; `Strategy.tolerance` is the raised one.

    **Arguments:** `report` of `jacobiflow.calibrate(..., chord=True)`, or the `Tuning` itself; `device` as a check: the
    flow must be on it; `progress`, whether to show bars on a terminal; `settings`, see `PlanSettings`.

    **Raises** `ValueError` for another flow's report, one without a tuning, or settings that do not fit, `TypeError`
    for other kinds of arguments.
    """
    tuning, batch_size, tolerance = _checked(flow, report, batch_size, tolerance, device, guidance)
    check_flag("progress", progress)
    check_kind("settings", settings, PlanSettings, "PlanSettings")
    start = FIRST_CALIBRATION_LATENT + tuning.samples  # the tuning has not seen them, and `sample` does not draw them
    num, config = max(batch_size, _FEW), flow.config
    latents = draw_latents(num, config.num_tokens, config.token_channels, tuning.seed, start)
    if _rounds_coarsely(flow):
        tolerance = _above_rounding(flow, latents[:_FEW], guidance, tolerance)
    latents = latents[:batch_size]
    exact = exact_costs(guided(flow.blocks[0], guidance), batch_size, flow)
    if (loop := _loop_plan(flow, exact, batch_size, tolerance, guidance, settings)) is not None:
        return loop
    counted, console = in_force(tuning.guidance) == in_force(guidance), Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bar:

        def attempt(chosen: Sequence[Option]) -> Trial:
            task = bar.add_task("trying the plan", total=len(chosen))
            return trial(flow, chosen, latents, guidance, partial(bar.advance, task))

        timed = partial(bar.track, description="timing sweeps")
        costs = measure(guided(flow.blocks[0], guidance), tuning, batch_size, flow, exact, timed)
        options = [block_options(block, costs, batch_size, tolerance, settings, counted) for block in tuning.blocks]
        chosen, alone = _choose(options, costs, tolerance, settings, attempt)
    return _planned(flow, chosen, alone, batch_size, tolerance, guidance, costs.spread)


def loop_plan(
    flow: ImageFlow, batch_size: int, tolerance: float, guidance: Guidance | None,
    settings: PlanSettings = PlanSettings(),  # noqa: B008  frozen
) -> Strategy | None:  # fmt: skip
    """The sequential loop in every block, where no iteration can be faster; else `None`.

    An iteration takes one sweep and the pass of its certificate at least. It takes a fraction of a second to find out,
    and needs no tuning.
    """
    exact = exact_costs(guided(flow.blocks[0], guidance), batch_size, flow)
    return _loop_plan(flow, exact, batch_size, tolerance, guidance, settings)


def _loop_plan(
    flow: ImageFlow, exact: ExactCosts, batch_size: int, tolerance: float, guidance: Guidance | None,
    settings: PlanSettings,
) -> Strategy | None:  # fmt: skip
    if exact.sequential > settings.least_passes * exact.certificate:
        return None
    loop = [Option(Solver(Sequential()), exact.sequential, 0.0)] * flow.config.num_blocks
    return _planned(flow, loop, loop, batch_size, tolerance, guidance, exact.spread)


def _planned(
    flow: ImageFlow, chosen: Sequence[Option], loop: Sequence[Option], batch_size: int, tolerance: float,
    guidance: Guidance | None, spread: float,
) -> Strategy:  # fmt: skip
    return Strategy(
        solvers=tuple(option.solver for option in chosen),
        fingerprint=fingerprint(flow),
        tolerance=float(tolerance),
        prediction=Prediction(
            device=device_name(flow.var.device),
            batch_size=batch_size,
            guidance=guidance,
            seconds=_seconds(chosen),
            sequential_seconds=_seconds(loop),
            error=combined([option.error for option in chosen]),
            spread=spread,
        ),
    )


def _checked(
    flow: ImageFlow, report: Report | Tuning, batch_size: int, tolerance: float, device: torch.device | str | None,
    guidance: Guidance | None,
) -> tuple[Tuning, int, float]:  # fmt: skip
    check_flow(flow)
    check_kind("report", report, Report | Tuning, "a Report or a Tuning")
    tuning = report if isinstance(report, Tuning) else report.tuning
    if tuning is None:
        raise InputValueError("this report has no tuning: calibrate with chord=True")
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    tolerance = check_positive("tolerance", tolerance, "a positive number; at 0 use strategy 'sequential'")
    check_guidance(guidance)
    if device is not None and check_device(device).type != flow.var.device.type:
        raise InputValueError(f"device={str(device)!r}: the flow is on {flow.var.device}; move it there first")
    tuning.check(flow)
    return tuning, batch_size, tolerance


# ------------------------------------------------------------------------------------------------------------ rounding


def _rounds_coarsely(flow: ImageFlow) -> bool:
    """Whether the network's products have fewer digits than float32."""
    low = flow.var.dtype.itemsize < 4 or precision(flow) == "tf32"
    return low or torch.is_autocast_enabled(flow.var.device.type)


def _above_rounding(
    flow: ImageFlow, latents: Float[Tensor, "b t c"], guidance: Guidance | None, tolerance: float
) -> float:
    """The tolerance, or twice what rounding leaves of these samples, if that is more; then with a warning."""
    least = _ROUNDING * rounding_floor(flow, latents, guidance)
    if least <= tolerance:
        return tolerance
    warnings.warn(
        f"tolerance {tolerance:g} is below the rounding of this flow's network: planned for {least:.1e}; a wider dtype "
        "allows a smaller one",
        stacklevel=3,
    )
    return least


def rounding_floor(flow: ImageFlow, latents: Float[Tensor, "b t c"], guidance: Guidance | None) -> float:
    """What rounding leaves of samples, however they are solved.

    The larger of the largest residual |g(x) - x| of the sequential loop's answers, over the blocks, and the largest
    difference between its images and those of sweeps that stop at this residual. Samples that overflow do not count.
    """
    num, largest = len(latents), 0.0
    labels = _labels(flow, num)

    def solve_block(i: int, z: Tensor) -> Tensor:
        nonlocal largest
        block, z = guided(flow.blocks[i], guidance), z.nan_to_num(0.0, 0.0, 0.0)
        exact = solve(block, z[:num], Solver(Sequential()), labels).x
        residual = certify(block, z[:num], exact, labels)
        largest = max([largest, *residual[residual.isfinite()].tolist()])
        swept = solve(block, z[num:], Solver(Whole(), stopping=Tolerance(largest)), labels).x
        return torch.cat((exact, swept))

    exact, swept = invert(flow, prior_tokens(flow, latents).repeat(2, 1, 1), solve_block).chunk(2)
    return max(largest, float((exact - swept).nan_to_num(0.0, 0.0, 0.0).abs().max()))


# -------------------------------------------------------------------------------------------------- choosing and trying


class Trial(NamedTuple):
    """Seconds that each block took as planned and by the sequential loop, and the largest error of an image."""

    seconds: tuple[float, ...]
    sequential: tuple[float, ...]
    error: float


def _choose(
    options: Sequence[Sequence[Option]], costs: Costs, tolerance: float, settings: PlanSettings,
    attempt: Callable[[Sequence[Option]], Trial],
) -> tuple[list[Option], list[Option]]:  # fmt: skip
    """An option per block, and the sequential loop's, with the seconds that they took where they were tried."""
    alone = Option(Solver(Sequential()), costs.sequential, 0.0)
    loop = [alone] * len(options)
    enough = 1 - settings.margin
    budget = tolerance
    for _ in range(settings.trials):
        chosen = cheapest([[alone, *found] for found in options], budget)
        if _seconds(chosen) > enough * _seconds(loop):
            break
        tried = attempt(chosen)
        if tried.error <= tolerance:
            loop = [alone._replace(seconds=seconds) for seconds in tried.sequential]
            timed = [
                option if option == alone else option._replace(seconds=seconds + costs.certificate)
                for option, seconds in zip(chosen, tried.seconds, strict=True)
            ]
            best = [min(pair, key=lambda option: option.seconds) for pair in zip(timed, loop, strict=True)]
            return (best if _seconds(best) <= enough * _seconds(loop) else loop), loop
        budget *= settings.stricter
    return loop, loop


def _seconds(options: Sequence[Option]) -> float:
    return sum(option.seconds for option in options)


def trial(
    flow: ImageFlow, chosen: Sequence[Option], latents: Float[Tensor, "b t c"], guidance: Guidance | None,
    advance: Callable[[], object] = lambda: None,
) -> Trial:  # fmt: skip
    """Solve one batch of latents both ways, without certificates: the medians of a few runs, of one where it is long.

    The error is infinite where the options lose a sample in the last block that the loop does not; one that they lost
    before goes on as zeros.
    """
    num, labels = len(latents), _labels(flow, len(latents))
    seconds, sequential = {}, {}

    def solve_block(i: int, x: Tensor) -> Tensor:
        """The rows as planned, and then the same by the loop."""
        block, z = guided(flow.blocks[i], guidance), x.nan_to_num(0.0, 0.0, 0.0)
        runs, alone = list[Solution](), list[Solution]()
        while len(runs) < REPEATS and sum(run.seconds for run in (*runs, *alone)) < MOST_SECONDS:
            runs.append(solve(block, z[:num], chosen[i].solver, labels))
            alone.append(solve(block, z[num:], Solver(Sequential()), labels))
        seconds[i], sequential[i] = (statistics.median(run.seconds for run in each) for each in (runs, alone))
        advance()
        return torch.cat((runs[0].x, alone[0].x))

    planned, exact = invert(flow, prior_tokens(flow, latents).repeat(2, 1, 1), solve_block).chunk(2)
    error = (planned - exact)[torch.isfinite(exact)].abs().nan_to_num(torch.inf, torch.inf)
    largest = float(error.max()) if len(error) else math.inf
    blocks = range(flow.config.num_blocks)
    return Trial(tuple(seconds[i] for i in blocks), tuple(sequential[i] for i in blocks), largest)


def _labels(flow: ImageFlow, num: int) -> Int[Tensor, " n"] | None:
    """All classes in turn."""
    classes = flow.config.num_classes
    return torch.arange(num, device=flow.var.device) % classes if classes else None
