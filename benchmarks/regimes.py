"""Times blocks of many sizes: `python -m benchmarks.regimes [FILE ...]`.

`regimes` (docs/solvers.md) has the exact loop in native code and in PyTorch, and an encoding pass in float32 and in
bfloat16, of blocks of random weights (T = 256, C = 12) and of the bundled TarFlows. A solver that evaluates every token
k times takes at least k passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.lib.models import latents, random_flow
from benchmarks.lib.process import without_native
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import time_runs
from jacobiflow.models.tarflow import TarFlowBlock

BATCH_SIZES = (1, 4, 16)
SHAPES = ((128, 2), (192, 4), (256, 2), (256, 4), (384, 4), (512, 4), (768, 8))  # width, layers
TRAINED = ("fashion-p2", "emoji-p2", "digits-p1")
# Names in the result files.
EXACT_LOOP, LOOP_IN_PYTORCH, PASS, BF16_PASS = "fused loop", "eager loop", "pass", "pass in bfloat16"
ROUNDS = 2

FLOWS: Mapping[str, Callable[[], jf.TarFlow]] = {
    f"{width}x{layers}": partial(
        random_flow, jf.TarFlowConfig(3, 32, 2, width=width, num_blocks=1, layers_per_block=layers)
    )
    for width, layers in SHAPES
} | {name: partial(jf.TarFlow.from_pretrained, name) for name in TRAINED}  # fmt: skip


def exact_loop(block: TarFlowBlock, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """The inverse by the exact loop, in native code if there is any."""
    return jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x


@torch.inference_mode()
def measure_block(key: Json) -> Json:
    """Seconds of a flow's last block by each way, and the difference between the two loops."""
    flow = FLOWS[key["name"]]().requires_grad_(False)
    (z, labels), block = latents(flow, key["batch_size"]), flow.blocks[-1]
    context = labels if flow.config.num_classes else None
    cache = block.to_bf16(block.init_cache(z, jf.Context(context)))
    loop = partial(exact_loop, block, z, context)
    runs: dict[str, Callable[[], Any]] = {
        EXACT_LOOP: loop,
        LOOP_IN_PYTORCH: without_native()(loop),
        PASS: partial(block, z, context),
        BF16_PASS: partial(block.update, z, z, 0, z.shape[1], cache),
    }
    seconds, results = time_runs(runs, ROUNDS)
    difference = float((results[EXACT_LOOP] - results[LOOP_IN_PYTORCH]).abs().max())
    config = flow.config
    return {
        "width": config.width, "layers": config.layers_per_block, "tokens": config.num_tokens,
        "values": config.token_dim, "weights_mb": sum(p.nbytes for p in block.parameters()) / 1e6,
        "seconds": seconds, "max_difference": difference,
    }  # fmt: skip


def in_passes(run: Json, name: str = EXACT_LOOP) -> float:
    """Seconds of a way in units of an encoding pass in float32, by the least of the rounds."""
    return float(run["seconds"][name]["min"] / run["seconds"][PASS]["min"])


def best_in_passes(run: Json) -> float:
    return min(in_passes(run, EXACT_LOOP), in_passes(run, LOOP_IN_PYTORCH))


def main() -> None:
    blocks = product(FLOWS, BATCH_SIZES)
    measure_files(__doc__, {
        "regimes": [([{"name": name, "trained": name in TRAINED, "batch_size": batch} for name, batch in blocks],
                     measure_block)],
    })  # fmt: skip


if __name__ == "__main__":
    main()
