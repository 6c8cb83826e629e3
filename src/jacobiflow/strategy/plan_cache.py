"""The strategy "auto": plans are made once, and kept in memory and in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from jacobiflow.checks import check_count, check_kind, check_number
from jacobiflow.errors import InputError
from jacobiflow.files import cache_folder, files_sha256, json_bytes, sha256
from jacobiflow.flows.fingerprint import cached_fingerprint
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.measuring import machine
from jacobiflow.memory import exceeds_memory
from jacobiflow.native import library_name
from jacobiflow.progress import Progress
from jacobiflow.solvers import Sequential, Solver, Tolerance
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE
from jacobiflow.strategy.plan import make_plan, warn_if_raised
from jacobiflow.strategy.strategy import Strategy
from jacobiflow.strategy.tune import Tuning, find_tuning

_PACKAGE = Path(__file__).parent.parent
_BUSY = 0.3  # timings that differ by a larger share are in doubt
_BUSY_SECONDS = 60.0  # for which a plan in doubt is used: planning at every call would take longer

# By the blocks of a flow, which its views share: the plans for its present weights, and until when each is used.
_plans: WeakKeyDictionary[Any, dict[tuple[Hashable, ...], tuple[Strategy, float]]] = WeakKeyDictionary()


def auto(
    flow: ImageFlow, batch_size: int, tolerance: float | None = None,
    tuning: Tuning | None = None, progress: Progress | None = None,
) -> Strategy:  # fmt: skip
    """Returns the plan for a flow, its device, a batch size and a tolerance, made by `jacobiflow.plan` once.

    A plan is made for the next power of two of the batch size, or for the batch size itself if so many samples would
    not fit in memory. It is kept in memory and in the user's cache folder. If the machine was so busy that its timings
    are in doubt, the plan is used for a minute, in this process only. Other weights, tunings, native libraries,
    settings of PyTorch and versions of the planner have plans of their own; `cached_fingerprint` says which changes of
    weights are noticed.

    The arguments are those of `plan`. At a tolerance of 0 the exact loop is the plan.
    """
    check_flow(flow)
    tolerance = DEFAULT_TOLERANCE if tolerance is None else check_number("tolerance", tolerance)
    batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    check_kind("tuning", tuning, Tuning | None, "a Tuning, as tune returns, or None")
    if tolerance == 0:
        return Strategy.uniform(Solver(Sequential(), stopping=Tolerance(0)), flow.config.num_blocks)
    weights = cached_fingerprint(flow)
    key = (weights, batch_size, tolerance, flow.guidance, *_environment(flow, tuning))
    plans = _plans.setdefault(flow.blocks, {})
    strategy, until = plans.get(key, (None, 0.0))
    if strategy is None or time.monotonic() > until:
        strategy = _read_or_make(flow, weights, batch_size, tolerance, tuning, progress)
        if any(weights != other for other, *_ in plans):
            plans.clear()
        plans[key] = strategy, time.monotonic() + (_BUSY_SECONDS if _is_doubtful(strategy) else math.inf)
    warn_if_raised(strategy, tolerance)
    return strategy


def _environment(flow: ImageFlow, tuning: Tuning | None) -> tuple[Hashable, ...]:
    """The parts of a plan's key that can change within a process and are no arguments of `auto`."""
    device = flow.var.device
    return (
        str(device), flow.var.dtype, torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device.type),
        torch.get_num_threads(), library_name() if device.type == "cpu" else None,
        _tuning_states(flow) if tuning is None else sha256(json_bytes(tuning.to_json())),
    )  # fmt: skip


def _tuning_states(flow: ImageFlow) -> tuple[tuple[int, ...], ...]:
    """A value that changes if a tuning in the flow's model folder does."""
    states = []
    for file in flow.report_files:
        if file.name.startswith("tuning"):
            with suppress(OSError):
                state = os.stat(file)
                states.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(states)


def _read_or_make(
    flow: ImageFlow, weights: str, batch_size: int, tolerance: float,
    tuning: Tuning | None, progress: Progress | None,
) -> Strategy:  # fmt: skip
    """The plan in the cache folder, or a new one, which is written there unless its timings are in doubt."""
    rounded = 1 << (batch_size - 1).bit_length()
    batch_size = batch_size if exceeds_memory(flow, rounded) else rounded
    folder = cache_folder()
    file = None
    if folder is not None:
        file = folder / "plans" / f"{_key(flow, weights, batch_size, tolerance, tuning)}.json"
        if (strategy := _read(file, weights, flow.config.num_blocks)) is not None:
            return strategy
    strategy = make_plan(flow, tuning, batch_size, tolerance, progress=progress)
    if file is not None and not _is_doubtful(strategy):
        with suppress(OSError):  # a plan that cannot be kept is made again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            strategy.save(file)
    return strategy


def _is_doubtful(strategy: Strategy) -> bool:
    return strategy.prediction is not None and strategy.prediction.spread > _BUSY


def _key(flow: ImageFlow, weights: str, batch_size: int, tolerance: float, tuning: Tuning | None) -> str:
    """A hash of all that a plan depends on."""
    environment = _environment(flow, tuning)
    if tuning is None:
        file = find_tuning(flow)
        environment = (*environment[:-1], None if file is None else files_sha256([file]))
    device = json.dumps(machine(flow.var.device), sort_keys=True)
    parts = (weights, batch_size, tolerance, flow.guidance, device, _code(), *environment)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of the code that plans and solves: another version may plan otherwise, or take other times."""
    return files_sha256(sorted(file for room in ("strategy", "solvers") for file in (_PACKAGE / room).glob("*.py")))


def _read(file: Path, weights: str, num_blocks: int) -> Strategy | None:
    """The plan in a file of the cache folder; `None` if there is none, or if it cannot be read."""
    try:
        plan = Strategy.load(file)
    except InputError:
        return None
    fits = plan.fingerprint == weights and len(plan.solvers) == num_blocks and plan.prediction is not None
    return plan if fits else None
