"""The strategy that a name, a file or a `Strategy` stands for: the one place where commands and functions choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jacobiflow.calibration.report import Report
from jacobiflow.checks import check_count, check_kind, check_number, short
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance, check_guidance
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.strategy.cache import auto
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE
from jacobiflow.strategy.strategy import Strategy

AUTO = "auto"


def choose(
    flow: ImageFlow,
    strategy: str | Path | Strategy,
    batch_size: int,
    *,
    tolerance: float | None = None,
    guidance: Guidance | None = None,
    report: Report | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Strategy:
    """The `Strategy` to solve batches of `batch_size` with.

    **Arguments:**

    - `strategy`: "auto", planned for this flow, device and batch size, or "auto:1e-2", to that tolerance; another name
        (see `Strategy.parse`); the path of a JSON file; or a `Strategy`.
    - `tolerance`: replaces every tolerance that the strategy has. `None` leaves a `Strategy` or a file its own, and
        gives a name 1e-3.
    - `guidance`: the guidance that is sampled with.
    - `report`: of `jacobiflow.calibrate`. "auto" plans by it, by default by the one in the flow's folder; other names
        take their guesses from it; a `Strategy` or a file keeps its own.
    - `say`: is called with a line of text before something that takes long.

    **Raises** `ValueError` that quotes what is wrong: an unknown name, a strategy that does not fit the flow, the
    device or the guidance, or a tolerance that the strategy would ignore. `TypeError` for other kinds.
    """
    batch_size, tolerance = _checked(flow, strategy, batch_size, tolerance, guidance, report, say)
    if isinstance(strategy, str) and is_auto(strategy):
        return auto(flow, batch_size, _tolerance_of(strategy, tolerance), guidance, report, say)
    config = flow.config
    if isinstance(strategy, Strategy):
        found = strategy
    elif str(strategy).endswith(".json"):
        found = Strategy.load(strategy)
    else:
        found = Strategy.parse(
            str(strategy), report, num_blocks=config.num_blocks, num_tokens=config.num_tokens,
            tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
        )  # fmt: skip
    if tolerance is not None:
        found = found.with_tolerance(tolerance)
        if not found.has_tolerance:
            raise InputValueError(
                f"tolerance={tolerance}: strategy {short(strategy)} stops after a number of sweeps and ignores it; "
                "leave the tolerance out, or give a strategy with one"
            )
    found.check(flow)
    found.check_use(flow.var.device, batch_size, guidance)
    return found


def _checked(
    flow: ImageFlow, strategy: object, batch_size: int, tolerance: float | None, guidance: Guidance | None,
    report: Report | None, say: Callable[[str], None],
) -> tuple[int, float | None]:  # fmt: skip
    check_flow(flow)
    check_kind("strategy", strategy, str | Path | Strategy, "a name, a Strategy, or the path of one's file")
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance)
    check_guidance(guidance)
    check_kind("report", report, Report | None, "a Report, as calibrate returns, or None")
    check_kind("say", say, Callable, "a function of a line of text")
    return batch_size, tolerance


def is_auto(name: str) -> bool:
    """Whether `name` is "auto" or "auto:TOLERANCE". **Raises** `TypeError` where it is no text."""
    check_kind("name", name, str, "a name")
    return name.strip().lower().partition(":")[0] == AUTO


def _tolerance_of(name: str, tolerance: float | None) -> float | None:
    _, colon, text = name.partition(":")
    if not colon:
        return tolerance
    try:
        found = float(text)
    except ValueError as error:
        raise InputValueError(f"strategy {short(name)}: give auto, or auto:TOLERANCE such as auto:1e-2") from error
    if tolerance not in (None, found):
        raise InputValueError(f"strategy {name!r} with tolerance {tolerance!r}: give the tolerance once")
    check_number("tolerance", found)
    return found
