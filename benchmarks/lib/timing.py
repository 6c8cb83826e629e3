"""Timings as result files have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.lib.results import Json
from jacobiflow.utils.timing import Timing, time_call, time_interleaved

IN_PYTORCH = "sequential, in PyTorch"  # The exact loop without native code.


def to_json(timings: Mapping[str, Timing]) -> Json:
    return {name: vars(timing) for name, timing in timings.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    return time_call(run, torch.device("cpu"))[0]


def fitting_rounds(seconds: float, budget: float, least: int, most: int) -> int:
    """The number of rounds of `seconds` each that fit into a budget of seconds, within limits."""
    return min(most, max(least, int(budget / seconds)))


def time_speed_up(runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[Json, Json]:
    """Times "library" and "accelerated" interleaved; returns the metrics, and the results of both."""
    timings, results = time_interleaved(runs, rounds)
    ratio = timings["library"].median / timings["accelerated"].median
    return {"rounds": rounds, "seconds": to_json(timings), "speed_up": ratio}, results
