"""Shared parts of the benchmarks: folders, flows to time, and result files that are completed step by step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.files import write_json
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine
from jacobiflow.native import SWITCH

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
MODELS = ROOT / "src" / "jacobiflow" / "models"
IN_PYTORCH = "sequential, in PyTorch"

Run = Callable[[], Any]
Figures = dict[str, Any]


def latents(flow: jf.TarFlow, batch: int) -> tuple[Tensor, Tensor]:
    """Latents and labels of a batch, the same each time."""
    z = draw_latents(batch, flow.config.num_tokens, flow.config.token_channels, seed=1)
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
    """Runs exact loops in PyTorch until the block ends."""
    with patch.dict(os.environ, {SWITCH: "0"}):
        yield


def in_pytorch(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function without native code."""

    def run_in_pytorch(*arguments: Any) -> Any:
        with without_native():
            return run(*arguments)

    return run_in_pytorch


def speed_up(runs: Mapping[str, Run], rounds: int) -> tuple[Figures, dict[str, Any]]:
    """Times "library" and "accelerated" in turn; returns the figures, and the answers of both."""
    seconds, answers = interleave(runs, rounds)
    return {
        "rounds": rounds,
        "seconds": {name: vars(timing) for name, timing in seconds.items()},
        "speed_up": seconds["library"].median / seconds["accelerated"].median,
    }, answers


def complete(
    out: Path,
    keys: Iterable[Figures],
    measure: Callable[[Figures], Figures],
    show: Callable[[Figures], None] = print,
) -> None:
    """Adds a run to the result file for each key that it lacks, and writes after each.

    A file from another machine is replaced.
    """
    result: Figures = {"machine": machine(), "runs": []}
    if out.exists():
        previous = json.loads(out.read_text())
        result = previous if previous["machine"] == result["machine"] else result
    out.parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        if not any(key.items() <= run.items() for run in result["runs"]):
            result["runs"].append(key | measure(key))
            write_json(out, result)
            show(result["runs"][-1])
