"""Timings that can be compared, and the machine that they depend on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from jacobiflow.utils.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: median, minimum and maximum over the rounds after the warm-up."""

    median: float
    min: float
    max: float


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    warm_up: bool = True,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Times callables in turn, so that a slow phase of the machine slows all of them.

    Each round starts with the next callable, so that none always follows the same one.

    Args:
        runs: Callables by name.
        repeats: Number of rounds over all callables.
        device: Device whose queued work is timed too.
        progress: Is called after each run.
        warm_up: If True, one more round comes first, which is not timed.

    Returns:
        A `Timing` by name, and the first result of each run.
    """
    device = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    names, rounds = [*runs], repeats + warm_up
    for count, (number, place) in enumerate(product(range(rounds), range(len(names))), start=1):
        name = names[(number + place) % len(names)]
        elapsed, result = time_call(runs[name], device)
        if number >= warm_up:
            seconds[name].append(elapsed)
        results.setdefault(name, result)
        del result  # frees its memory before the next run
        if progress is not None:
            progress(count, rounds * len(names), "timing")
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}, results


def time_call(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Returns the seconds of a call, including the work that it queues on the device, and its result."""
    _synchronize(device)
    started = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - started, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describes this machine: processor, cores, PyTorch's threads, device and versions."""
    device = torch.device(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jacobiflow": version("jacobiflow"),
    }


def has_bf16_products() -> bool:
    """Tells whether this processor multiplies in bfloat16, by units such as AVX512-BF16 or AMX; True if unknown."""
    path = Path("/proc/cpuinfo")
    return not path.exists() or "bf16" in path.read_text()


def _processor() -> str:
    """Returns the processor's model name, and its bfloat16 units, which a virtual machine's name hides."""
    name, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} with AVX512-BF16 and AMX" if any("amx_bf16" in line for line in lines) else name
