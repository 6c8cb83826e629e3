"""Measures an NVIDIA GPU for docs/devices.md: `python -m benchmarks.gpu`, then `make render`. It was never run on one.

It takes PyTorch for CUDA, and times bundled models by the original sampler, the exact loop, sweeps and `auto`. If it
was stopped, it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import jacobiflow as jf
from benchmarks.lib.models import latents, sample
from benchmarks.lib.results import Json, measure_files
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.utils.timing import describe_machine, time_interleaved

DEVICE = "cuda"
MODELS, BATCHES = ("digits-p1", "fashion-p2"), (1, 16, 64)
ROUNDS = 3
STRATEGIES = ("sequential", "jacobi", "window:32")


@torch.no_grad()
def measure(key: Json) -> Json:
    """Milliseconds of a batch in each way, and the largest difference from the exact loop."""
    flow, batch = jf.load(key["model"], device=DEVICE), key["batch"]
    z, context = latents(flow, batch)
    states = flow.context_kind.resolve(context, batch).values
    original = partial(original_sampler(flow)[1], flow, z.to(DEVICE), None if states is None else states.to(DEVICE))
    strategies: dict[str, Any] = {name: name for name in STRATEGIES}
    strategies["auto"] = jf.plan(flow, batch_size=batch)
    runs: dict[str, Callable[[], Any]] = {"original": original}
    runs |= {name: partial(sample, flow, each, z, context) for name, each in strategies.items()}
    timings, results = time_interleaved(runs, ROUNDS, DEVICE)
    errors = {name: float((results[name].x - results["sequential"].x).abs().max()) for name in strategies}
    return {"milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()}, "error": errors}


def keys() -> Iterator[Json]:
    for model, batch in product(MODELS, BATCHES):
        yield {"device": describe_machine(DEVICE)["device"], "model": model, "batch": batch}


def main() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu measures an NVIDIA GPU, and PyTorch finds none here")
    measure_files(__doc__, {"gpu": [(keys(), measure)]})


if __name__ == "__main__":
    main()
