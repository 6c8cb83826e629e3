"""Checks images on a GPU, then times the paper's models: `python -m benchmarks.gpu`, about ten minutes.

Images of bundled models by each kind of solver are compared with those of the exact loop on the CPU; it exits with 1
if one is wrong. Then one block of random weights in the shape of each of the paper's models is timed, and a model's
seconds are sums over its blocks. Random weights give the time of a sweep, not how many a trained model needs. Writes
docs/results/gpu.json after each.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, latents, parser, random_flow, to_json
from jacobiflow.comparison.baselines import GROWING_CACHE, original_sampler
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.utils.timing import describe_machine, time_interleaved

BUNDLED = ("fashion-p2", "digits-p1", "digits-maf")
STRATEGIES = ("sequential", "jacobi", "window:32", "auto")
SAMPLES, TOLERANCE = 8, 1e-4
PIXEL_BOUND = 1e-2  # a residual of 1e-4 is amplified up to 30 times
BATCHES, DTYPES, ROUNDS = (1, 16), ("float32", "bfloat16"), 3
EXACT_LOOP, ENCODING_PASS = "exact loop", "encoding pass"


def compare_images(device: torch.device) -> Json:
    """The largest difference of each solver's images from those of the exact loop on the CPU."""
    rows: list[Json] = []
    for name in BUNDLED:
        flow, reference = jf.load(name, device=device), jf.load(name)
        z, labels = latents(flow, SAMPLES)
        for guidance in (None, jf.Guidance(1.0)):
            sample = partial(jf.sample, latents=z, labels=labels)
            exact = sample(reference.guided(guidance), settings=None, strategy="sequential").images
            for strategy in STRATEGIES:
                tolerance = None if strategy == "sequential" else TOLERANCE
                images = sample(
                    flow.guided(guidance), settings=None, strategy=strategy, tolerance=tolerance
                ).images.cpu()
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


def time_model(preset: jf.Preset, batch: int, dtype: str, device: torch.device) -> Json:
    """Seconds of a model of the paper by each way to sample it, from those of one block."""
    config, guidance = preset.config, preset.recommended.guidance
    flow = random_flow(replace(config, num_blocks=1)).to(device, getattr(torch, dtype)).guided(guidance)
    z, labels = (values.to(device) for values in latents(flow, batch))
    classes = labels if flow.config.num_classes else None
    block, solvers = flow.inverse_blocks[0], solvers_of(preset)

    def encode() -> Tensor:
        with torch.inference_mode():
            return flow.encode(flow.from_tokens(z), classes)[0]

    runs: dict[str, Callable[[], Any]] = {
        GROWING_CACHE: partial(original_sampler(flow)[1], flow, z, classes),
        EXACT_LOOP: partial(jf.solve, block, z, jf.Solver(jf.Sequential()), classes),
        **{str(solver): partial(jf.solve, block, z, solver, classes) for solver in solvers},
        ENCODING_PASS: encode,
    }
    timings, results = time_interleaved(runs, ROUNDS, device)
    names, blocks = (GROWING_CACHE, EXACT_LOOP, ENCODING_PASS), preset.config.num_blocks
    seconds = {name: blocks * timings[name].median for name in names}
    seconds[preset.strategy] = sum(count * timings[str(solver)].median for solver, count in solvers.items())
    difference = flow.to_tokens(results[GROWING_CACHE]) - results[EXACT_LOOP].x
    return {
        "block": to_json(timings),
        "seconds": seconds,
        "rates": {name: seconds[GROWING_CACHE] / value for name, value in seconds.items()},
        "difference_of_loops": float(difference.abs().max()),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda", help="as PyTorch names it")
    arguments.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="file of the results (JSON)")
    options = arguments.parse_args()
    device = torch.device(options.device)
    name = describe_machine(device)["device"]
    keys: list[Json] = [{"part": "images", "device": name}]
    for batch, dtype, part in product(BATCHES, DTYPES, jf.PRESETS):
        keys.append({"part": part, "batch": batch, "dtype": dtype, "device": name})

    def measure(key: Json) -> Json:
        if key["part"] == "images":
            return compare_images(device)
        return time_model(jf.PRESETS[key["part"]], key["batch"], key["dtype"], device)

    result = complete(options.out, keys, measure, lambda run: print(json.dumps(run), flush=True))
    if wrong := [row for row in result["runs"][0]["rows"] if row["wrong"]]:
        sys.exit(f"images that differ from the CPU's by more than {PIXEL_BOUND:g}: {json.dumps(wrong)}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
