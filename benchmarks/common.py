"""Parts that the benchmarks share: folders, latents, random flows, and result files that are completed step by step."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.flow import Flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.native import SWITCH
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import Timing, describe_machine, time_interleaved

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
MODELS = ROOT / "src" / "jacobiflow" / "bundled"
IN_PYTORCH = "sequential, in PyTorch"

Json = dict[str, Any]


def parser(description: str | None) -> ArgumentParser:
    """Makes a parser that shows the docstring of a script as its help."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


def latents(flow: Flow, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and labels of a batch, the same each time."""
    z = draw_latents(batch, flow.config.num_tokens, flow.config.token_channels, seed)
    return z, torch.arange(batch) % max(flow.config.num_classes, 1)


def random_flow(config: jf.TarFlowConfig) -> jf.TarFlow:
    """A flow with random weights. The last layers, zero in a new flow, are small enough that nothing grows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = jf.TarFlow(config).eval().requires_grad_(False)
        for block in flow.blocks:
            block.proj_out.weight.normal_(std=0.1 * config.channels**-0.5)
    return flow


@contextmanager
def without_native() -> Iterator[None]:
    """Runs exact loops in PyTorch until the block ends; also decorates a function."""
    with patch.dict(os.environ, {SWITCH: "0"}):
        yield


def to_json(timings: Mapping[str, Timing]) -> Json:
    return {name: vars(timing) for name, timing in timings.items()}


def time_speed_up(runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[Json, Json]:
    """Times "library" and "accelerated" in turn; returns the metrics, and the results of both."""
    timings, results = time_interleaved(runs, rounds)
    ratio = timings["library"].median / timings["accelerated"].median
    return {"rounds": rounds, "seconds": to_json(timings), "speed_up": ratio}, results


def read(out: Path, new: Json) -> Json:
    """Reads a result file to go on with; `new` if there is none from the machine of `new`."""
    old = json.loads(out.read_text()) if out.exists() else new
    return old if old["machine"] == new["machine"] else new


def complete(
    out: Path, keys: Iterable[Json], measure: Callable[[Json], Json], show: Callable[[Json], None] = print
) -> Json:
    """Adds a run to the result file for each key that it lacks, writes after each, and returns the content."""
    result = read(out, {"machine": describe_machine(), "runs": []})
    out.parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        if not any(key.items() <= run.items() for run in result["runs"]):
            result["runs"].append(key | measure(key))
            write_json(out, result)
            show(result["runs"][-1])
    return result
