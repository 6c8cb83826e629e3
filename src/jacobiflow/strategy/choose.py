"""The strategy that a name, a file or a `Strategy` stands for: the one place where commands and functions choose."""

from __future__ import annotations

from pathlib import Path

from jacobiflow.calibration import Report
from jacobiflow.checks import check_kind, short
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.progress import Progress
from jacobiflow.strategy.plan_cache import auto
from jacobiflow.strategy.strategy import Strategy


def choose(
    flow: ImageFlow, strategy: str | Path | Strategy, batch_size: int, *, tolerance: float | None = None,
    report: Report | None = None, progress: Progress | None = None,
) -> Strategy:  # fmt: skip
    """Returns the `Strategy` to solve batches of a size with.

    Args:
        flow: The model.
        strategy: "auto", planned for this flow, device and batch size, or "auto:1e-2", to that tolerance; another name
            (see `Strategy.parse`); the path of a JSON file; or a `Strategy`.
        batch_size: Number of samples.
        tolerance: Replaces every tolerance that the strategy has. `None` leaves a `Strategy` or a file its own, and
            gives a name 1e-3.
        report: Of `jacobiflow.calibrate`: names in the paper's notation take their guesses from it.
        progress: Is called while "auto" makes a plan.

    Raises:
        ValueError: If the strategy would ignore the tolerance.
    """
    check_kind("strategy", strategy, str | Path | Strategy, "a name, a Strategy, or the path of one's file")
    if isinstance(strategy, str) and is_auto(strategy):
        return auto(flow, batch_size, _tolerance_of(strategy, tolerance), progress=progress)
    config = flow.config
    if isinstance(strategy, Strategy):
        choice = strategy
    elif str(strategy).endswith(".json"):
        choice = Strategy.load(strategy)
    else:
        choice = Strategy.parse(str(strategy), report, num_blocks=config.num_blocks, num_tokens=config.num_tokens)
    if tolerance is not None:
        choice = choice.with_tolerance(tolerance)
        if choice.tolerance is None and all(solver.stopping.atol is None for solver in choice.solvers):
            raise InputValueError(
                f"tolerance={tolerance}: strategy {short(strategy)} stops after a number of sweeps and ignores it; "
                "leave the tolerance out, or give a strategy with one"
            )
    choice.check(flow, batch_size)
    return choice


def is_auto(name: str) -> bool:
    """Tells if `name` is "auto" or "auto:TOLERANCE"."""
    return name.strip().lower().partition(":")[0] == "auto"


def _tolerance_of(name: str, tolerance: float | None) -> float | None:
    """The tolerance in "auto:TOLERANCE", or else `tolerance`. Raises ValueError if both are there and differ."""
    _, colon, text = name.partition(":")
    if not colon:
        return tolerance
    try:
        value = float(text)
    except ValueError as error:
        raise InputValueError(f"strategy {short(name)}: give auto, or auto:TOLERANCE such as auto:1e-2") from error
    if tolerance not in (None, value):
        raise InputValueError(f"strategy {name!r} with tolerance {tolerance!r}: give the tolerance once")
    return value
