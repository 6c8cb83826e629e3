"""The strategy "auto": planned once for a flow, a machine, a batch size and a tolerance, and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from jacobiflow.calibration.report import Report
from jacobiflow.calibration.reports import find_report
from jacobiflow.calibration.tune import TuneSettings, tune
from jacobiflow.calibration.tuning import Tuning
from jacobiflow.checks import check_count, check_kind, check_number
from jacobiflow.errors import InputError
from jacobiflow.files import cache_folder, files_sha256, json_bytes, sha256
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance, check_guidance, in_force
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.measuring import machine
from jacobiflow.native import library
from jacobiflow.solvers import Sequential, Solver, Tolerance, Whole, Window
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE
from jacobiflow.strategy.options import PlanSettings
from jacobiflow.strategy.plan import loop_plan, plan
from jacobiflow.strategy.strategy import Strategy, device_name

_SAMPLES = 4  # that a flow without a report is tuned on
_WINDOWS = (32, 64)  # tokens, tried on such a flow beside all of them

_plans: dict[str, Strategy] = {}


def auto(
    flow: ImageFlow, batch_size: int, tolerance: float | None = None, guidance: Guidance | None = None,
    report: Report | None = None, say: Callable[[str], None] = lambda text: None,
) -> Strategy:  # fmt: skip
    """What `strategy="auto"` stands for: the plan for this flow, device, batch size and tolerance (1e-3 by default).

    A plan is made once, for the next power of two of the batch size, by the tuning of `report`, by default that of the
    report in the flow's model folder that `find_report` finds for the guidance. It is kept in the user's cache folder.
    Where the sequential loop takes no longer than any iteration must, it is the plan, and no tuning is needed. Else a
    flow without a tuning is tuned on four fresh latents, with nothing fitted: enough to tell which blocks sweeps solve
    sooner than the loop. The loop solves all blocks at a tolerance of 0, and where one of these latents overflows.
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
    batch_size = 1 << (batch_size - 1).bit_length()
    weights = fingerprint(flow)
    key = _key(flow, weights, batch_size, tolerance, guidance, report)
    if key not in _plans:
        found = _read(key, weights, flow.config.num_blocks)
        _plans[key] = _make(flow, batch_size, tolerance, guidance, report, key, say) if found is None else found
    found = _plans[key]
    if found.tolerance is not None and found.tolerance > tolerance:
        say(f"auto: planned for a tolerance of {found.tolerance:.1e}, the rounding of the network")
    return found


def _key(
    flow: ImageFlow, weights: str, batch_size: int, tolerance: float, guidance: Guidance | None, report: Report | None
) -> str:
    """A hash of all that a plan depends on."""
    if report is not None:
        made_by = sha256(json_bytes(report.to_json()))
    else:
        made_by = files_sha256(file for file in flow.report_files if file.is_file())
    device = flow.var.device
    precision = (flow.var.dtype, torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device.type))
    where = json.dumps(machine(device), sort_keys=True)
    native = device.type == "cpu" and library() is not None
    words = (weights, where, precision, native, batch_size, tolerance, in_force(guidance), made_by)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


def _read(key: str, weights: str, num_blocks: int) -> Strategy | None:
    """The plan in the cache folder; `None` where there is none, or it cannot be read."""
    folder = _folder()
    if folder is None:
        return None
    try:
        found = Strategy.load(folder / f"{key}.json")
    except InputError:
        return None
    fits = found.fingerprint == weights and len(found.solvers) == num_blocks and found.prediction is not None
    return found if fits else None


def _make(
    flow: ImageFlow, batch_size: int, tolerance: float, guidance: Guidance | None, report: Report | None, key: str,
    say: Callable[[str], None],
) -> Strategy:  # fmt: skip
    tuning = _tuning(flow, report, guidance)
    say(f"auto: planning for batches of up to {batch_size} on {device_name(flow.var.device)}, once")
    if (loop := loop_plan(flow, batch_size, tolerance, guidance)) is not None:
        return _kept(loop, key, say)
    if tuning is None:
        say("auto: by a short trial; plans by a report of calibrate(..., chord=True) are faster")
        try:
            tuning = _short_trial(flow, tolerance, guidance)
        except InputError as error:  # a latent overflows
            say(f"auto: the sequential loop, since {error}")
            return _loop(flow, tolerance)
    return _kept(plan(flow, tuning, batch_size, tolerance, guidance=guidance, progress=False), key, say)


def _kept(made: Strategy, key: str, say: Callable[[str], None]) -> Strategy:
    """The plan, written to the cache folder unless its timings are in doubt."""
    folder = _folder()
    if made.prediction is not None and made.prediction.spread > PlanSettings().busy:
        say(f"auto: timings differ by {made.prediction.spread:.0%}, the machine is busy; planning anew next time")
    elif folder is not None:
        with suppress(OSError):  # a plan that cannot be kept is made again next time
            folder.mkdir(parents=True, exist_ok=True)
            made.save(folder / f"{key}.json")
    return made


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
