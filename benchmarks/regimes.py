"""Compares the exact loop with sweeps over widths, depths and batch sizes: `python -m benchmarks.regimes`, an hour.

Times one block of random weights (T = 256, C = 12), and a block of the bundled TarFlows: the exact loop in native
code and in PyTorch, and one encoding pass in float32 and in bfloat16. A solver that evaluates every token k times
takes at least k passes. Writes docs/results/regimes.json, which fills docs/regimes.md and docs/sizes.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, latents, parser, random_flow, to_json, without_native
from jacobiflow import native
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.models.tarflow import TarFlowBlock
from jacobiflow.utils.timing import time_interleaved

BATCH_SIZES = (1, 4, 16)
SHAPES = ((128, 2), (192, 4), (256, 2), (256, 4), (384, 4), (512, 4), (768, 8))  # channels, layers
TRAINED = ("fashion-p2", "emoji-p2", "digits-p1")
# Names in the result file.
EXACT_LOOP, LOOP_IN_PYTORCH, PASS, BF16_PASS = "fused loop", "eager loop", "pass", "pass in bfloat16"
ROUNDS = 2
MAX_SECONDS = 60  # The most that the rounds over one shape and batch size take.

FLOWS: Mapping[str, Callable[[], jf.TarFlow]] = {
    f"{channels}x{layers}": partial(
        random_flow, jf.TarFlowConfig(3, 32, 2, channels=channels, num_blocks=1, layers_per_block=layers)
    )
    for channels, layers in SHAPES
} | {name: partial(jf.TarFlow.from_pretrained, name) for name in TRAINED}  # fmt: skip


def exact_loop(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> Tensor:
    """The inverse by the exact loop, in native code if there is any."""
    return jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x


def runs_to_time(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> dict[str, Callable[[], Any]]:
    with torch.inference_mode():
        cache = block.to_bf16(block.init_cache(z, jf.Context(labels)))
    loop = partial(exact_loop, block, z, labels)
    return {
        EXACT_LOOP: loop,
        LOOP_IN_PYTORCH: without_native()(loop),
        PASS: torch.inference_mode()(partial(block, z, labels)),
        BF16_PASS: torch.inference_mode()(partial(block.update, z, z, 0, z.shape[1], cache)),
    }


def measure(flow: jf.TarFlow, batch: int) -> Json:
    """Seconds of the flow's last block by each way, and the difference between the two loops."""
    z, labels = latents(flow, batch)
    runs = runs_to_time(flow.blocks[-1], z, labels if flow.config.num_classes else None)
    started = perf_counter()
    seconds, results = time_interleaved(runs, 1)
    rounds = min(ROUNDS, int(2 * MAX_SECONDS / (perf_counter() - started)) - 1)
    if rounds > 1:
        seconds, _ = time_interleaved(runs, rounds)
    difference = float((results[EXACT_LOOP] - results[LOOP_IN_PYTORCH]).abs().max())
    return shape_of(flow) | {"seconds": to_json(seconds), "rounds": max(rounds, 1), "max_difference": difference}


def shape_of(flow: jf.TarFlow) -> Json:
    """The sizes of a block on which its time depends."""
    config = flow.config
    return {
        "channels": config.channels, "layers": config.layers_per_block, "tokens": config.num_tokens,
        "values": config.token_channels, "weights_mb": sum(p.nbytes for p in flow.blocks[-1].parameters()) / 1e6,
    }  # fmt: skip


def in_passes(run: Json, name: str = EXACT_LOOP) -> float:
    """Seconds of a way in units of an encoding pass in float32, by the least of the rounds."""
    return float(run["seconds"][name]["min"] / run["seconds"][PASS]["min"])


def best_in_passes(run: Json) -> float:
    return min(in_passes(run, EXACT_LOOP), in_passes(run, LOOP_IN_PYTORCH))


def show(run: Json) -> None:
    passes = "  ".join(f"{name} {in_passes(run, name):.2f}" for name in (EXACT_LOOP, LOOP_IN_PYTORCH, BF16_PASS))
    print(f"{run['name']}, {run['weights_mb']:.1f} MB, batch {run['batch_size']}: {passes} passes", flush=True)


def main() -> None:
    parser(__doc__).parse_args()
    if native.load_library() is None:
        sys.exit(f"no native loop to time: {native.describe()}")
    keys = [{"name": name, "trained": name in TRAINED, "batch_size": batch} for name in FLOWS for batch in BATCH_SIZES]

    def measure_key(key: Json) -> Json:
        return measure(FLOWS[key["name"]]().requires_grad_(False), key["batch_size"])

    complete(RESULTS / "regimes.json", keys, measure_key, show)


if __name__ == "__main__":
    keep_freed_memory()
    main()
