"""The strategy that a name, a file or a `Strategy` stands for; plans for "auto" are kept in memory and on disk."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from jacobiflow.calibration import CalibrationReport
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.fixed_point import Sequential, Solver, Tolerance
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.models.memory import exceeds_memory
from jacobiflow.native import library_name
from jacobiflow.planner.fit import find_tuning
from jacobiflow.planner.notation import is_auto
from jacobiflow.planner.planner import make_plan, warn_if_raised
from jacobiflow.planner.strategy import Strategy
from jacobiflow.utils.checks import check_count, check_kind, check_number, format_value
from jacobiflow.utils.files import cache_folder, sha256
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import describe_machine

_PACKAGE = Path(__file__).parent.parent
_BUSY = 0.3  # timings that differ by a larger share are in doubt
_BUSY_SECONDS = 60.0  # for which a plan in doubt is used: planning at every call would take longer

# By the blocks of a flow, which its views share, and by conditions: weights, their plan, and until when it is used.
_plans: WeakKeyDictionary[Any, dict[Hashable, tuple[str, Strategy, float]]] = WeakKeyDictionary()
_planning = threading.RLock()  # two plans at once would spoil each other's timings


def choose(
    flow: Flow, strategy: str | Path | Strategy, batch_size: int, *, tolerance: float | None = None,
    report: CalibrationReport | None = None, progress: Progress | None = None,
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
                f"tolerance={tolerance}: strategy {format_value(strategy)} stops after a number of sweeps and ignores "
                "it; leave the tolerance out, or give a strategy with one"
            )
    choice.check(flow, batch_size)
    return choice


def _tolerance_of(name: str, tolerance: float | None) -> float | None:
    """The tolerance in "auto:TOLERANCE", or else `tolerance`. Raises ValueError if both are there and differ."""
    _, colon, text = name.partition(":")
    if not colon:
        return tolerance
    try:
        value = float(text)
    except ValueError as error:
        raise InputValueError(
            f"strategy {format_value(name)}: give auto, or auto:TOLERANCE such as auto:1e-2"
        ) from error
    if tolerance not in (None, value):
        raise InputValueError(f"strategy {name!r} with tolerance {tolerance!r}: give the tolerance once")
    return value


def auto(flow: Flow, batch_size: int, tolerance: float | None = None, progress: Progress | None = None) -> Strategy:
    """Returns the plan for a flow, its device, a batch size and a tolerance, made by `jacobiflow.plan` once.

    A plan is made for the next power of two of the batch size, or for the batch size itself if so many samples would
    not fit in memory. It is kept in memory and in the user's cache folder. If the machine was so busy that its timings
    are in doubt, the plan is used for a minute, in this process only. Other weights, tunings, native libraries,
    settings of PyTorch and versions of the planner have plans of their own; `cached_fingerprint` says which changes of
    weights are noticed, and a tuning is read when a model is loaded. At a tolerance of 0 the exact loop is the plan.
    """
    check_flow(flow)
    tolerance = DEFAULT_TOLERANCE if tolerance is None else check_number("tolerance", tolerance)
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    if tolerance == 0:
        return Strategy.uniform(Solver(Sequential(), stopping=Tolerance(0)), flow.config.num_blocks)
    weights = cached_fingerprint(flow)
    conditions = (batch_size, tolerance, *_environment(flow))
    plans = _plans.setdefault(flow.blocks, {})

    def current_plan() -> Strategy | None:
        planned_weights, strategy, until = plans.get(conditions, ("", None, 0.0))
        return strategy if planned_weights == weights and time.monotonic() <= until else None

    strategy = current_plan()
    if strategy is None:
        with _planning:
            strategy = current_plan()
            if strategy is None:
                strategy = _read_or_make(flow, weights, batch_size, tolerance, progress)
                until = time.monotonic() + (_BUSY_SECONDS if _is_doubtful(strategy) else math.inf)
                plans[conditions] = weights, strategy, until
    warn_if_raised(strategy, tolerance)
    return strategy


def _environment(flow: Flow) -> tuple[Hashable, ...]:
    """The conditions of a plan that can change within a process."""
    device = flow.var.device
    return (
        flow.guidance, str(device), flow.var.dtype, torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device.type), torch.get_num_threads(), library_name(),
    )  # fmt: skip


def _read_or_make(flow: Flow, weights: str, batch_size: int, tolerance: float, progress: Progress | None) -> Strategy:
    """The plan in the cache folder, or a new one, which is written there unless its timings are in doubt."""
    rounded = 1 << (batch_size - 1).bit_length()
    batch_size = batch_size if exceeds_memory(flow, rounded) else rounded
    tuning = find_tuning(flow)
    conditions = (
        weights, batch_size, tolerance, *_environment(flow), describe_machine(flow.var.device), _code(),
        None if tuning is None else sha256(tuning),
    )  # fmt: skip
    folder = cache_folder()
    file = None if folder is None else folder / "plans" / f"{sha256(repr(conditions).encode())}.json"
    if file is not None:
        with suppress(InputError):  # none there, or a damaged one
            return Strategy.load(file)
    strategy = make_plan(flow, None, batch_size, tolerance, True, progress)
    if file is not None and not _is_doubtful(strategy):
        with suppress(OSError):  # a plan that cannot be kept is made again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            strategy.save(file)
    return strategy


def _is_doubtful(strategy: Strategy) -> bool:
    return strategy.prediction is not None and strategy.prediction.spread > _BUSY


@functools.cache
def _code() -> str:
    """A hash of the code that plans and solves: another version may plan otherwise, or take other times."""
    return sha256(*sorted(file for room in ("planner", "fixed_point") for file in (_PACKAGE / room).glob("*.py")))
