"""Checks images on a GPU, then times the paper's models: `python -m benchmarks.gpu`, about ten minutes.

1. *images*: bundled models by each kind of solver, against the exact loop on the CPU.
2. The paper's four models in shape, at batch 1 and 16, in float32 and in bfloat16, with the paper's guidance: the
   original sampler, the exact loop (a CUDA graph a token), the paper's strategy at its number of sweeps, and an
   encoding pass. One block of random weights is timed, and a model's seconds are sums over its blocks. Random weights
   give the time of a sweep, not how many a trained model needs.

Writes docs/results/gpu.json after each; interrupted, it goes on. Exits with 1 if an image is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Figures, complete, random_flow
from jacobiflow.baselines import GROWING_CACHE, growing_cache_sample
from jacobiflow.data import balanced_labels
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine
from jacobiflow.memory import keep_freed_memory

OUT = RESULTS / "gpu.json"
BUNDLED = ("fashion-p2", "digits-p1", "digits-maf")
STRATEGIES = ("sequential", "jacobi", "window:32", "auto")
SAMPLES, TOLERANCE = 8, 1e-4
PIXEL_BOUND = 1e-2  # a residual of 1e-4 is amplified up to 30 times
BATCHES, DTYPES, ROUNDS = (1, 16), ("float32", "bfloat16"), 3
EXACT_LOOP, ENCODING_PASS = "exact loop", "encoding pass"


def images(device: torch.device, models: Sequence[str] = BUNDLED, strategies: Sequence[str] = STRATEGIES) -> Figures:
    """The largest difference of each solver's images from those of the exact loop on the CPU."""
    rows: list[Figures] = []
    for name in models:
        flow, reference = jf.load(name, device=device), jf.load(name)
        config = flow.config
        z = draw_latents(SAMPLES, config.num_tokens, config.token_channels, seed=0)
        labels = balanced_labels(SAMPLES, config.num_classes)
        for guidance in (None, jf.Guidance(1.0)):
            draw = partial(jf.sample, latents=z, labels=labels)
            exact = draw(reference.guided(guidance), strategy="sequential").images
            for strategy in strategies:
                tolerance = None if strategy == "sequential" else TOLERANCE
                images = draw(flow.guided(guidance), strategy=strategy, tolerance=tolerance).images.cpu()
                difference = float((images - exact).abs().max())
                rows.append({
                    "model": name, "guided": guidance is not None, "strategy": strategy, "difference": difference,
                    "wrong": not difference <= PIXEL_BOUND,
                })  # fmt: skip
    return {"rows": rows}


def solvers_of(preset: jf.Preset) -> Counter[jf.Solver]:
    """The solvers of the paper's strategy, without its early stop, and the number of blocks that each solves."""
    config = preset.config
    plan = jf.Strategy.parse(preset.strategy, num_blocks=config.num_blocks, num_tokens=config.num_tokens)
    return Counter(replace(solver, stopping=replace(solver.stopping, ebound=None)) for solver in plan.solvers)


def shape(preset: jf.Preset, batch: int, dtype: str, device: torch.device) -> Figures:
    """Seconds of a model of the paper by each way to sample it, from those of one block."""
    config, guidance = preset.config, preset.recommended.guidance
    flow = random_flow(replace(config, num_blocks=1)).to(device, getattr(torch, dtype)).guided(guidance)
    z = draw_latents(batch, config.num_tokens, config.token_channels, seed=1).to(device)
    labels = torch.arange(batch, device=device) % config.num_classes if config.num_classes else None
    block, solvers = flow.inverse_blocks[0], solvers_of(preset)

    def encode() -> Tensor:
        with torch.inference_mode():
            return flow.encode(flow.to_images(z), labels)[0]

    runs: dict[str, Callable[[], Any]] = {
        GROWING_CACHE: partial(growing_cache_sample, flow, z, labels),
        EXACT_LOOP: partial(jf.solve, block, z, jf.Solver(jf.Sequential()), labels),
        **{str(solver): partial(jf.solve, block, z, solver, labels) for solver in solvers},
        ENCODING_PASS: encode,
    }
    timings, answers = interleave(runs, ROUNDS, device)
    seconds = {name: timing.median for name, timing in timings.items()}
    models = {name: config.num_blocks * seconds[name] for name in (GROWING_CACHE, EXACT_LOOP, ENCODING_PASS)}
    models[preset.strategy] = sum(count * seconds[str(solver)] for solver, count in solvers.items())
    difference = flow.to_tokens(answers[GROWING_CACHE])[0] - answers[EXACT_LOOP].x
    return {
        "block": {name: asdict(timing) for name, timing in timings.items()},
        "seconds": models,
        "rates": {name: models[GROWING_CACHE] / value for name, value in models.items()},
        "difference_of_loops": float(difference.abs().max()),
    }


def main(
    arguments: Sequence[str] | None = None,
    presets: Mapping[str, jf.Preset] = jf.PRESETS,
    models: Sequence[str] = BUNDLED,
) -> None:
    """Measures what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    keys: list[Figures] = [{"part": "images", "device": machine(device)["device"]}]
    keys += [
        {"part": name, "batch": batch, "dtype": dtype, "device": machine(device)["device"]}
        for batch in BATCHES
        for dtype in DTYPES
        for name in presets
    ]

    def measure(key: Figures) -> Figures:
        if key["part"] == "images":
            return images(device, models)
        return shape(presets[key["part"]], key["batch"], key["dtype"], device)

    complete(options.out, keys, measure, lambda run: print(json.dumps(run), flush=True))
    first = json.loads(options.out.read_text())["runs"][0]
    wrong = [row for row in first["rows"] if row["wrong"]]
    if wrong:
        sys.exit(f"images that differ from the CPU's by more than {PIXEL_BOUND:g}: {json.dumps(wrong)}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
