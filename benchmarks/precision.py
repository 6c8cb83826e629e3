"""Measures weights of 16 bits: `python -m benchmarks.precision`, half an hour on two cores that are otherwise idle.

Whole samples of trained models, by the exact loop that reads their weights in 16 bits and by the one that reads them
in float32; blocks of random weights, up to two layers of STARFlow's released shape, with their memory; and float64.
Writes docs/results/precision.json, which fills docs/devices.md and docs/regimes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, latents, parser, random_flow, to_json, without_native
from benchmarks.memory import in_new_process, memory, random_starflow, reset_peak_memory
from benchmarks.star import RELEASED, prompts_of
from examples.captions import GUIDANCE, load
from jacobiflow import native
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.models import Flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.utils.timing import time_interleaved

MODELS = ("emoji-p2", "emoji-p2, bfloat16", "emoji-star", "fashion-p2")
BLOCKS = ("512x4", "768x8")  # channels, layers
RELEASED_RUNS = (("bfloat16", False), ("float32", False), ("bfloat16", True))  # dtype, in PyTorch
DOUBLE = "emoji-p2"  # The model that is sampled in float64, too.
BATCHES = (1, 4, 16, 64)
ROUNDS = {1: 9, 4: 7, 16: 5, 64: 3}
FLOAT32, HALVES, AUTO, ORIGINAL, PASS = "float32", "16 bits", "auto", "original", "pass"
MOST_ORIGINAL = 4  # samples that the original sampler draws too, which takes minutes for more


def trained(name: str) -> Flow:
    """A trained model: with the weights that it is stored with, or rounded to bfloat16."""
    name, _, weights = name.partition(", ")
    flow = load().guided(GUIDANCE) if name == "emoji-star" else jf.load(name)
    if weights == "bfloat16":
        for parameter in flow.parameters():
            parameter.copy_(parameter.bfloat16())
    return flow


@contextmanager
def in_float32() -> Iterator[None]:
    """Exact loops read all weights in float32; also decorates a function."""
    with patch.object(native.load_library(), "has_fast_halves", False):
        yield


def samples(key: Json) -> Json:
    """Seconds of a batch of unguided samples (of emoji-star guided ones), and errors against the float32 loop."""
    flow, batch = trained(key["model"]), key["batch"]
    z, labels = latents(flow, batch)
    context = flow.check_context(prompts_of(batch) if flow.reads_text else labels, batch)
    draw = partial(jf.sample, flow, latents=z, context=context, settings=None)
    plan = jf.plan(flow, batch_size=batch)
    runs: dict[str, Callable[[], Any]] = {
        FLOAT32: in_float32()(partial(draw, strategy="sequential")),
        HALVES: partial(draw, strategy="sequential"),
        AUTO: partial(draw, strategy=plan),
        PASS: torch.no_grad()(partial(flow.encode, torch.zeros(batch, *(flow.image_shape or ())), context)),
    }
    if batch <= MOST_ORIGINAL:
        runs[ORIGINAL] = torch.no_grad()(partial(original_sampler(flow)[1], flow, z, context.values))
    timings, results = time_interleaved(runs, ROUNDS[batch])
    answers = {name: result for name, result in results.items() if isinstance(result, jf.Samples)}
    return {
        "seconds": to_json(timings),
        "errors": {name: float((each.x - answers[FLOAT32].x).abs().max()) for name, each in answers.items()},
    }


def wide(key: Json) -> Json:
    """Seconds of a block of random weights: by the exact loop, and by sweeps with their certificate."""
    channels, layers = map(int, key["block"].split("x"))
    config = jf.TarFlowConfig(3, 32, 2, channels=channels, num_blocks=1, layers_per_block=layers)
    plain, rows = random_flow(config), key["rows"]
    stored, z = deepcopy(plain).bfloat16().float(), latents(plain, rows)[0]

    def solve(flow: jf.TarFlow, strategy: str) -> Any:
        solver = jf.Strategy.parse(strategy, num_blocks=1, num_tokens=256).solvers[0]
        return partial(jf.solve_certified, flow.blocks[0], z, solver)

    runs = {
        FLOAT32: solve(plain, "sequential"),
        HALVES: solve(stored, "sequential"),
        "window:32": solve(plain, "window:32"),
        "jacobi": solve(plain, "jacobi"),
        PASS: partial(jf.certify, plain.blocks[0], z, z),
    }
    timings, results = time_interleaved(runs, 3 if channels < 768 else 1, warm_up=channels < 768)
    return {
        "seconds": to_json(timings),
        "residual": max(float(results[name].residual.max()) for name in ("window:32", "jacobi")),
    }


def released(key: Json) -> Json:
    """Seconds and peak memory of the exact loop of two layers of the released shape, in a process of its own."""
    return in_new_process(_released, RELEASED, key["released"], key["in_pytorch"])


def _released(config: jf.STARFlowConfig, dtype: str, in_pytorch: bool) -> Json:
    native.load_library()
    before = memory("VmRSS")
    block = random_starflow(config, dtype).blocks[0]
    z = draw_latents(1, config.num_tokens, config.token_channels, seed=1)
    weights = sum(parameter.nbytes for parameter in block.parameters())
    reset_peak_memory()
    solve = partial(jf.solve, block, z, jf.Solver(jf.Sequential()))
    started = perf_counter()
    (without_native()(solve) if in_pytorch else solve)()
    seconds = perf_counter() - started
    return {"seconds": seconds, "weights": weights, "peak": (memory("VmHWM") - before) / weights}


def double(key: Json) -> Json:
    """Seconds of a batch of samples of `DOUBLE` in float64, by native code and by PyTorch, and in float32."""
    flow, batch = jf.load(DOUBLE), key["double"]
    flows = {"float32": flow, "float64": deepcopy(flow).double()}
    z, labels = latents(flow, batch)

    def draw(dtype: str) -> Tensor:
        return jf.sample(flows[dtype], latents=z, labels=labels, settings=None, strategy="sequential").x

    runs = {name: partial(draw, name) for name in flows} | {"in PyTorch": without_native()(partial(draw, "float64"))}
    timings, results = time_interleaved(runs, 3)
    errors = {name: float((results[name] - results["in PyTorch"]).abs().max()) for name in flows}
    return {"seconds": to_json(timings), "errors": errors}


def measure(key: Json) -> Json:
    kinds: dict[str, Callable[[Json], Json]] = {"model": samples, "block": wide, "released": released, "double": double}
    return next(run for name, run in kinds.items() if name in key)(key)


def main() -> None:
    parser(__doc__).parse_args()
    keys: list[Json] = [{"model": model, "batch": batch} for model in MODELS for batch in BATCHES]
    keys += [{"block": block, "rows": rows} for block in BLOCKS for rows in (1, 4, 16)]
    keys += [{"released": dtype, "in_pytorch": in_pytorch} for dtype, in_pytorch in RELEASED_RUNS]
    keys += [{"double": batch} for batch in (1, 16)]
    complete(RESULTS / "precision.json", keys, torch.no_grad()(measure))


if __name__ == "__main__":
    keep_freed_memory()
    main()
