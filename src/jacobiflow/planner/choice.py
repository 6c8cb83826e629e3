"""`choose`: the strategy that a name, a file or a `Strategy` stands for."""

from __future__ import annotations

from pathlib import Path

from jacobiflow.calibration import CalibrationReport
from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow
from jacobiflow.planner.cache import auto
from jacobiflow.planner.notation import is_auto
from jacobiflow.planner.strategy import Strategy
from jacobiflow.utils.checks import check_kind, check_number, format_value
from jacobiflow.utils.progress import Progress


def choose(
    flow: Flow, strategy: str | Path | Strategy, batch_size: int, *, tolerance: float | None = None,
    report: CalibrationReport | None = None, progress: Progress | None = None,
) -> Strategy:  # fmt: skip
    """Returns the `Strategy` for batches of a size.

    Args:
        flow: The model.
        strategy: "auto", planned for this flow, device and batch size, or "auto:1e-2", to that tolerance; another name
            (see `Strategy.parse`); the path of a JSON file; or a `Strategy`.
        batch_size: Number of samples.
        tolerance: Replaces every tolerance of the strategy. By default a `Strategy` or a file keeps its own, and a name
            gets 1e-3.
        report: A report of `jacobiflow.calibrate`, from which names take their guesses.
        progress: Is called while "auto" makes a plan.

    Raises:
        ValueError: If the strategy would ignore the tolerance.
    """
    check_kind("strategy", strategy, str | Path | Strategy, "a name, a Strategy, or the path of one's file")
    if isinstance(strategy, str) and is_auto(strategy):
        return auto(flow, batch_size, auto_tolerance(strategy, tolerance, report), progress)
    config = flow.config
    if isinstance(strategy, Strategy):
        plan = strategy
    elif str(strategy).endswith(".json"):
        plan = Strategy.load(strategy)
    else:
        plan = Strategy.parse(str(strategy), report, num_blocks=config.num_blocks, num_tokens=config.num_tokens)
    if tolerance is not None:
        plan = plan.with_tolerance(tolerance)
        if plan.tolerance is None and all(solver.stopping.atol is None for solver in plan.solvers):
            raise InputValueError(
                f"strategy {format_value(strategy)} stops after a number of sweeps and ignores it; leave the tolerance "
                "out, or give a strategy with one",
                argument="tolerance",
                value=tolerance,
            )
    plan.check(flow, batch_size)
    return plan


def auto_tolerance(name: str, tolerance: float | None, report: CalibrationReport | None = None) -> float | None:
    """Returns the tolerance of "auto:TOLERANCE"; that of "auto" is `tolerance`.

    Raises:
        ValueError: If the tolerance is not a number from 0, if it is given twice, or if there is a report.
    """
    if report is not None:
        message = f"strategy {name!r} fits its own guesses; leave the report out, or give another strategy"
        raise InputValueError(message, argument="report", value="a CalibrationReport")
    _, colon, text = name.partition(":")
    if not colon:
        return None if tolerance is None else check_number("tolerance", tolerance)
    try:
        value = float(text)
    except ValueError as error:
        raise InputValueError(
            f"strategy {format_value(name)}: give auto, or auto:TOLERANCE such as auto:1e-2"
        ) from error
    if tolerance not in (None, value):
        raise InputValueError(f"strategy {name!r} with tolerance {tolerance!r}: give the tolerance once")
    return check_number("tolerance", value)
