"""`auto`: the plan for a flow here and now; plans are kept in memory and on disk."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch

from jacobiflow.errors import InputError
from jacobiflow.fixed_point import Partition, Sequential, Solver
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
from jacobiflow.fixed_point.registry import registered_pieces
from jacobiflow.models.checkpoints.fingerprint import cached_fingerprint
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.models.memory import exceeds_memory
from jacobiflow.native import library_name
from jacobiflow.planner.planner import make_plan, warn_if_raised
from jacobiflow.planner.strategy import Strategy
from jacobiflow.utils.checks import check_count, check_number
from jacobiflow.utils.files import cache_folder, sha256
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import describe_machine

_PACKAGE = Path(__file__).parent.parent
_MAX_CROWDING = 0.25
"""Number of cores that programs may use beyond those that PyTorch leaves free. If one of them takes the core of a
thread, the other threads wait for it at each step of the exact loop."""
_CROWDING_SECONDS = 0.2
"""Seconds over which the use of the cores is measured."""
_BUSY_SECONDS = 60.0
"""Seconds for which the plan of a busy machine is used; to plan at every call would take longer."""
_MAX_PLANS = 16
"""Number of plans of a flow in memory."""
_MAX_FILES = 100
"""Number of plans in the cache folder."""

_plans: WeakKeyDictionary[Any, dict[Any, tuple[Strategy, float]]] = WeakKeyDictionary()
"""Plans and the times at which they expire, by the blocks of a flow, which its views share, and by conditions."""
_planning = threading.RLock()
"""Held while a plan is made: two at once would spoil each other's timings."""


def auto(flow: Flow, batch_size: int, tolerance: float | None = None, progress: Progress | None = None) -> Strategy:
    """Returns the plan for a flow, its device, a batch size and a tolerance, made by `jacobiflow.plan` once.

    A plan is made for the next power of two of the batch size, or for the batch size itself if the power of two would
    not fit in memory. The last plans are kept in memory, and in the user's cache folder unless the flow has changed
    since an earlier plan, as in training. If programs used the cores that PyTorch needs, the plan is used for a minute,
    in this process only.

    Other weights, native libraries, settings of PyTorch and versions of the planner have plans of their own.
    `cached_fingerprint` says which changes of weights are noticed. At a tolerance of 0 the exact loop is the plan.
    """
    check_flow(flow)
    tolerance = DEFAULT_TOLERANCE if tolerance is None else check_number("tolerance", tolerance)
    batch_size = check_count("batch_size", batch_size, maximum=MAX_SAMPLES)
    if tolerance == 0:
        return Strategy.uniform(Solver(Sequential()), flow.config.num_blocks, tolerance)
    weights = cached_fingerprint(flow)
    conditions = (weights, batch_size, tolerance, *_environment(flow))
    plans = _plans.setdefault(flow.blocks, {})
    strategy = _find_plan(plans, conditions)
    if strategy is None:
        with _planning:
            strategy = _find_plan(plans, conditions)  # Another thread may have made it.
            if strategy is None:
                should_save = all(weights == earlier for earlier, *_ in plans)
                strategy, is_busy = _load_or_make(flow, weights, batch_size, tolerance, should_save, progress)
                plans[conditions] = strategy, time.monotonic() + _BUSY_SECONDS if is_busy else math.inf
                if len(plans) > _MAX_PLANS:
                    del plans[next(iter(plans))]
    warn_if_raised(strategy, tolerance)
    return strategy


def _find_plan(plans: dict[Any, tuple[Strategy, float]], conditions: Hashable) -> Strategy | None:
    strategy, expires = plans.get(conditions, (None, -math.inf))
    return strategy if time.monotonic() <= expires else None


def _environment(flow: Flow) -> tuple[Hashable, ...]:
    """The conditions of a plan that can change within a process."""
    device = flow.var.device
    return (
        flow.guidance, str(device), flow.var.dtype, torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device.type) and str(torch.get_autocast_dtype(device.type)),
        torch.get_num_threads(), library_name(), *sorted(registered_pieces(Partition)),
    )  # fmt: skip


def _load_or_make(
    flow: Flow, weights: str, batch_size: int, tolerance: float, should_save: bool, progress: Progress | None
) -> tuple[Strategy, bool]:
    """Returns the plan in the cache folder, or a new one, and True if the machine was too busy to trust it."""
    power_of_two = 1 << (batch_size - 1).bit_length()
    batch_size = batch_size if exceeds_memory(flow, power_of_two) else power_of_two
    machine = describe_machine(flow.var.device)
    conditions = (weights, batch_size, tolerance, *_environment(flow), machine, _code_hash())
    folder = cache_folder()
    file = None if folder is None else folder / "plans" / f"{sha256(repr(conditions).encode())}.json"
    if file is not None:
        with suppress(InputError):  # The file may be missing or damaged.
            return Strategy.load(file), False
    is_crowded = flow.var.device.type == "cpu" and _is_crowded()
    strategy = make_plan(flow, batch_size, tolerance, True, progress)
    # On crowded cores the exact loop loses to sweeps that it otherwise beats; if it wins, no doubt is left.
    is_busy = is_crowded and any(solver.partition != Sequential() for solver in strategy.solvers)
    if file is not None and should_save and not is_busy:
        with suppress(OSError):  # A plan that cannot be saved is made again next time.
            file.parent.mkdir(parents=True, exist_ok=True)
            strategy.save(file)
            for old in sorted(file.parent.glob("*.json"), key=os.path.getmtime)[:-_MAX_FILES]:
                old.unlink()
    return strategy, is_busy


def _is_crowded() -> bool:
    """Tells if programs compute on cores that PyTorch's threads will need."""
    percents = psutil.cpu_percent(_CROWDING_SECONDS, percpu=True)
    if hasattr(os, "sched_getaffinity"):  # A container or a batch system may have given this process a few cores.
        percents = [percents[core] for core in os.sched_getaffinity(0) if core < len(percents)]
    return sum(percents) / 100 > len(percents) - torch.get_num_threads() + _MAX_CROWDING


@functools.cache
def _code_hash() -> str:
    """A hash of the code that plans and solves: another version may plan otherwise, or take other times."""
    folders = (_PACKAGE / name for name in ("blocks", "models", "native", "fixed_point", "planner"))
    return sha256(*sorted(file for folder in folders for file in folder.rglob("*.py")))
