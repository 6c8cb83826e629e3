"""Timings as result files have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.lib.results import Json
from jacobiflow.utils.timing import time_call, time_interleaved

IN_PYTORCH = "sequential, in PyTorch"  # The exact loop without native code.


def time_runs(runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: bool = True) -> tuple[Json, dict[str, Any]]:
    """Times runs in turn; returns the median, the least and the most seconds of each run, and the results."""
    timings, results = time_interleaved(runs, rounds, warm_up=warm_up)
    return {name: vars(timing) for name, timing in timings.items()}, results


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    return time_call(run, torch.device("cpu"))[0]


def time_speed_up(runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[Json, Json]:
    """Times "library" and "accelerated" interleaved; returns the metrics, and the results of both."""
    seconds, results = time_runs(runs, rounds)
    ratio = seconds["library"]["median"] / seconds["accelerated"]["median"]
    return {"rounds": rounds, "seconds": seconds, "speed_up": ratio}, results
