"""Measurements: timings that can be compared, differences between images, the machine."""

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
from jaxtyping import Float
from torch import Tensor

from jacobiflow.utils.checks import check_count, check_device, check_floating, check_kind
from jacobiflow.utils.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: `median`, `min` and `max` over the rounds that count."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Error:
    """Largest, mean and root-mean-square difference between entries of two answers; see `paired_error`."""

    max: float
    mean: float
    rms: float


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    warm_up: bool = True,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Times callables in turn: a warm-up round, which does not count, then `repeats` rounds over all of them.

    A slow phase of the machine then slows all of them. Without `warm_up` the first round counts. Returns a `Timing` by
    name, and the first result of each run.
    """
    repeats = check_count("repeats", repeats)
    device = check_device(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    rounds = range(-1 if warm_up else 0, repeats)
    for done, (number, (name, run)) in enumerate(product(rounds, runs.items()), start=1):
        elapsed, result = timed(run, device)
        if number >= 0:
            seconds[name].append(elapsed)
        results.setdefault(name, result)
        del result  # or a second answer would be in memory beside the next run
        if progress is not None:
            progress(done, len(rounds) * len(runs), "timing")
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}, results


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Returns the seconds of a call, with all work that it queued on the device, and its result."""
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


def paired_error(actual: Float[Tensor, "n c h w"], exact: Float[Tensor, "n c h w"]) -> Error:
    """Measures the difference between images of the same latents, entry by entry, in the images' units.

    An entry that is NaN in only one of them counts as infinite. One that is NaN in both counts as 0: the exact inverse
    overflows there, and both report it.
    """
    check_kind("actual", actual, Tensor, "a torch.Tensor of images")
    check_floating("actual", actual, ("any",) * actual.ndim)
    check_floating("exact", exact, tuple(actual.shape))
    both_nan = actual.isnan() & exact.isnan()
    difference = (actual.double() - exact.double()).abs().masked_fill(both_nan, 0).nan_to_num(torch.inf, torch.inf)
    return Error(float(difference.max()), float(difference.mean()), float(difference.square().mean().sqrt()))


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describes the machine of a timing: processor, cores, PyTorch's threads, device and versions."""
    device = check_device(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jacobiflow": version("jacobiflow"),
    }


def _processor() -> str:
    """The processor's model name, and its bfloat16 units, which the name hides in a virtual machine."""
    name, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} with AVX512-BF16 and AMX" if any("amx_bf16" in line for line in lines) else name
