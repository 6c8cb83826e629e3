"""The strategy "auto": planned once for a flow, a machine, a batch size and a tolerance, and kept in a cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from jacobiflow.calibration.report import Report
from jacobiflow.calibration.reports import find_report
from jacobiflow.calibration.tune import LatentOverflowError, TuneSettings, tune
from jacobiflow.calibration.tuning import Tuning
from jacobiflow.checks import check_count, check_kind, check_number
from jacobiflow.errors import InputError
from jacobiflow.files import cache_folder, files_sha256, json_bytes, sha256
from jacobiflow.flows.fingerprint import cached_fingerprint, fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance, check_guidance, in_force
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.measuring import machine
from jacobiflow.native import library_name
from jacobiflow.solvers import Sequential, Solver, Tolerance, Whole, Window
from jacobiflow.strategy.memory import exceeds_memory
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE
from jacobiflow.strategy.options import PlanSettings
from jacobiflow.strategy.plan import loop_plan, plan
from jacobiflow.strategy.strategy import Strategy, device_name

_SAMPLES = 4  # that a flow without a report is tuned on
_WINDOWS = (32, 64)  # tokens, tried on such a flow beside all of them
_PACKAGE = Path(__file__).parent.parent
_DOUBTFUL_SECONDS = 60.0  # for which a plan of a busy machine is used: planning at every call would take longer

# For each flow, the plans for its present weights, and until when each is used, by `time.monotonic`.
_plans: WeakKeyDictionary[ImageFlow, dict[tuple[Hashable, ...], tuple[Strategy, float]]] = WeakKeyDictionary()


def auto(
    flow: ImageFlow, batch_size: int, tolerance: float | None = None, guidance: Guidance | None = None,
    report: Report | None = None, say: Callable[[str], None] = lambda text: None,
) -> Strategy:  # fmt: skip
    """What `strategy="auto"` stands for: the plan for this flow, device, batch size and tolerance (1e-3 by default).

    A plan is made once, for the next power of two of the batch size, or for the batch size itself if so many samples
    would not fit in memory. It is made by the tuning of `report`, by default that of the report in the flow's model
    folder that `find_report` finds for the guidance. If the sequential loop takes no longer than any iteration must, it
    is the plan, and no tuning is needed. Else a flow without a tuning is tuned on four fresh latents, with nothing
    fitted: enough to tell which blocks sweeps solve sooner than the loop. The loop solves all blocks at a tolerance of
    0, and if one of these latents overflows.

    The plan is kept in memory and in the user's cache folder. If the machine was so busy that its timings are in doubt,
    the plan is used for a minute, in this process only. A plan is made anew for other weights, reports and settings of
    PyTorch, and by another version of this package; `cached_fingerprint` says which changes of weights are noticed.

    `say` is called with a line of text before something that takes long.

    **Raises** `ValueError` where `report` is of another flow. One of other weights in the model folder only warns.
    """
    tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
    check_flow(flow)
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    tolerance = check_number("tolerance", tolerance)
    check_guidance(guidance)
    check_kind("report", report, Report | None, "a Report, as calibrate returns, or None")
    check_kind("say", say, Callable, "a function of a line of text")
    if report is not None:
        report.check(flow)
    if tolerance == 0:
        return _loop(flow, tolerance)
    weights = cached_fingerprint(flow)
    asked = (weights, batch_size, tolerance, in_force(guidance), *_situation(flow, report))
    plans = _plans.setdefault(flow, {})
    strategy, until = plans.get(asked, (None, 0.0))
    if strategy is None or time.monotonic() > until:
        strategy = _read_or_make(flow, weights, batch_size, tolerance, guidance, report, say)
        if any(weights != other for other, *_ in plans):
            plans.clear()
        plans[asked] = strategy, time.monotonic() + (_DOUBTFUL_SECONDS if _is_doubtful(strategy) else math.inf)
    if strategy.tolerance is not None and strategy.tolerance > tolerance:
        say(f"auto: planned for a tolerance of {strategy.tolerance:.1e}, the rounding of the network")
    return strategy


def _situation(flow: ImageFlow, report: Report | None) -> tuple[Hashable, ...]:
    """All that can change within a process and that a plan depends on, beside what `auto` is asked for."""
    device, dtype = flow.var.device, flow.var.dtype
    return (
        str(device), dtype, torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device.type),
        torch.get_num_threads(), library_name() if device.type == "cpu" else None,
        tuple(map(_file_state, flow.report_files)) if report is None else sha256(json_bytes(report.to_json())),
    )  # fmt: skip


def _file_state(file: Path) -> tuple[int, ...] | None:
    """It changes if the file does; `None` if there is none."""
    with suppress(OSError):
        state = file.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns
    return None


def _read_or_make(
    flow: ImageFlow, weights: str, batch_size: int, tolerance: float, guidance: Guidance | None,
    report: Report | None, say: Callable[[str], None],
) -> Strategy:  # fmt: skip
    """The plan in the cache folder, or a new one, which is written there unless its timings are in doubt."""
    rounded = 1 << (batch_size - 1).bit_length()
    batch_size = batch_size if exceeds_memory(flow, rounded, guidance) else rounded
    folder, file = _folder(), None
    if folder is not None:
        file = folder / f"{_key(flow, weights, batch_size, tolerance, guidance, report)}.json"
        if (strategy := _read(file, weights, flow.config.num_blocks)) is not None:
            return strategy
    strategy = _make(flow, batch_size, tolerance, guidance, report, say)
    if strategy.prediction is None:
        return strategy
    if _is_doubtful(strategy):
        spread = strategy.prediction.spread
        say(f"auto: timings differ by {spread:.0%}, the machine is busy; planning anew in a minute")
    elif file is not None:
        with suppress(OSError):  # a plan that cannot be kept is made again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            strategy.save(file)
    return strategy


def _is_doubtful(strategy: Strategy) -> bool:
    return strategy.prediction is not None and strategy.prediction.spread > PlanSettings().busy


def _key(
    flow: ImageFlow, weights: str, batch_size: int, tolerance: float, guidance: Guidance | None, report: Report | None
) -> str:
    """A hash of all that a plan depends on."""
    situation = _situation(flow, report)
    if report is None:
        situation = (*situation[:-1], files_sha256(file for file in flow.report_files if file.is_file()))
    where = json.dumps(machine(flow.var.device), sort_keys=True)
    parts = (weights, batch_size, tolerance, in_force(guidance), where, _code(), *situation)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of this package: another version may plan otherwise, or take other times."""
    return files_sha256(sorted(_PACKAGE.rglob("*.py")))


def _read(file: Path, weights: str, num_blocks: int) -> Strategy | None:
    """The plan in a file of the cache folder; `None` where there is none, or it cannot be read."""
    try:
        found = Strategy.load(file)
    except InputError:
        return None
    fits = found.fingerprint == weights and len(found.solvers) == num_blocks and found.prediction is not None
    return found if fits else None


def _make(
    flow: ImageFlow, batch_size: int, tolerance: float, guidance: Guidance | None, report: Report | None,
    say: Callable[[str], None],
) -> Strategy:  # fmt: skip
    tuning = _tuning(flow, report, guidance)
    say(f"auto: planning for batches of up to {batch_size} on {device_name(flow.var.device)}, once")
    if (loop := loop_plan(flow, batch_size, tolerance, guidance)) is not None:
        return loop
    if tuning is None:
        say("auto: by a short trial; plans by a report of calibrate(..., chord=True) are faster")
        try:
            tuning = _short_trial(flow, tolerance, guidance)
        except LatentOverflowError as error:
            say(f"auto: the sequential loop, since {error}")
            return _loop(flow, tolerance)
    return plan(flow, tuning, batch_size, tolerance, guidance=guidance, progress=False)


def _loop(flow: ImageFlow, tolerance: float) -> Strategy:
    return Strategy.uniform(Solver(Sequential(), stopping=Tolerance(tolerance)), flow.config.num_blocks)


def _short_trial(flow: ImageFlow, tolerance: float, guidance: Guidance | None) -> Tuning:
    sizes = (size for size in _WINDOWS if size < flow.config.num_tokens)
    settings = TuneSettings(
        tolerances=(tolerance, tolerance / 10, tolerance / 100), typical=tolerance, fit=False,
        partitions=(*map(Window, sizes), Whole()), fine=(), coarse=(), coarse_to_tolerance=(),
    )  # fmt: skip
    return tune(flow, guidance=guidance, samples=_SAMPLES, progress=False, settings=settings)


def _tuning(flow: ImageFlow, report: Report | None, guidance: Guidance | None) -> Tuning | None:
    """The tuning in `report`, by default in the flow's own; `None` where there is none for these weights."""
    if report is not None:
        return report.tuning
    file = find_report(flow, guidance)
    if file is None:
        return None
    report = Report.load(file)
    if report.tuning is None:
        return None
    if report.tuning.fingerprint != fingerprint(flow):
        warnings.warn(
            "the report in the flow's folder is of other weights: planned without it; calibrate this flow", stacklevel=2
        )
        return None
    return report.tuning


def _folder() -> Path | None:
    """Where plans are kept; `None` where the user has no home."""
    folder = cache_folder()
    return None if folder is None else folder / "plans"
