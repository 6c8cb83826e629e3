"""Compares the exact loop with sweeps over widths, depths and batch sizes: `python -m benchmarks.regimes`, an hour.

Times one block of random weights (32 x 32 x 3 pixels in patches of 2: T = 256, C = 12), and a block of the bundled
TarFlows in their own shapes: the exact loop in native code, the same in PyTorch, one encoding pass in float32, and one
in bfloat16. A solver that evaluates every token k times takes at least k passes, so it wins where the exact loop takes
more than k passes.

Writes docs/results/regimes.json after each shape and batch size; interrupted, it goes on. Runs take turns, `--rounds`
rounds after one that does not count; fewer if that would take more than a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Figures, complete, latents, random_flow, without_native
from jacobiflow import native
from jacobiflow.flows.tarflow import TarFlowBlock
from jacobiflow.measuring import interleave
from jacobiflow.memory import keep_freed_memory

OUT = RESULTS / "regimes.json"
BATCH_SIZES = (1, 4, 16)
SHAPES = ((128, 2), (192, 4), (256, 2), (256, 4), (384, 4), (512, 4), (768, 8))
MODELS = ("fashion-p2", "emoji-p2", "digits-p1")
# Names in the result file.
EXACT_LOOP, LOOP_IN_PYTORCH, PASS, BF16_PASS = "fused loop", "eager loop", "pass", "pass in bfloat16"
MAX_SECONDS = 60  # of the rounds over one shape and batch size


def config_of(channels: int, layers: int) -> jf.TarFlowConfig:
    """The config of a flow of one block."""
    return jf.TarFlowConfig(
        in_channels=3, image_size=32, patch_size=2, channels=channels, num_blocks=1, layers_per_block=layers
    )


def exact_loop(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> Tensor:
    """The inverse by the exact loop, in native code if there is any."""
    return jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x


def loop_in_pytorch(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> Tensor:
    """The inverse by the exact loop in PyTorch."""
    with without_native():
        return exact_loop(block, z, labels)


def runs_to_time(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> dict[str, Callable[[], Any]]:
    """Both loops and both passes, by name."""

    @torch.inference_mode()
    def encode() -> None:
        block(z, labels)

    @torch.inference_mode()
    def encode_in_bf16() -> None:
        block.update(z, z, 0, z.shape[1], lowered)

    with torch.inference_mode():
        lowered = block.to_bf16(block.init_cache(z, labels))
    return {
        EXACT_LOOP: lambda: exact_loop(block, z, labels),
        LOOP_IN_PYTORCH: lambda: loop_in_pytorch(block, z, labels),
        PASS: encode,
        BF16_PASS: encode_in_bf16,
    }


def measure(flow: jf.TarFlow, batch: int, rounds: int) -> Figures:
    """Seconds of the flow's last block by each way, and the difference between the two loops."""
    z, labels = latents(flow, batch)
    runs = runs_to_time(flow.blocks[-1], z, labels if flow.config.num_classes else None)
    started = perf_counter()
    seconds, answers = interleave(runs, 1)
    rounds = min(rounds, int(2 * MAX_SECONDS / (perf_counter() - started)) - 1)
    if rounds > 1:
        seconds, _ = interleave(runs, rounds)
    return {
        "seconds": {name: asdict(timing) for name, timing in seconds.items()},
        "rounds": max(rounds, 1),
        "max_difference": float((answers[EXACT_LOOP] - answers[LOOP_IN_PYTORCH]).abs().max()),
    }


def shape_of(flow: jf.TarFlow) -> Figures:
    """The sizes of a block on which its time depends."""
    config, block = flow.config, flow.blocks[-1]
    return {
        "channels": config.channels,
        "layers": config.layers_per_block,
        "tokens": config.num_tokens,
        "values": config.token_channels,
        "weights_mb": sum(parameter.nbytes for parameter in block.parameters()) / 1e6,
    }


def in_passes(run: Figures, name: str = EXACT_LOOP) -> float:
    """Seconds of a way in units of an encoding pass in float32, by the least of the rounds."""
    return float(run["seconds"][name]["min"] / run["seconds"][PASS]["min"])


def best_in_passes(run: Figures) -> float:
    """The faster loop in encoding passes."""
    return min(in_passes(run, EXACT_LOOP), in_passes(run, LOOP_IN_PYTORCH))


def show(run: Figures) -> None:
    """Prints a run."""
    passes = "  ".join(f"{name} {in_passes(run, name):.2f}" for name in (EXACT_LOOP, LOOP_IN_PYTORCH, BF16_PASS))
    print(f"{run['name']}, {run['weights_mb']:.1f} MB, batch {run['batch_size']}: {passes} passes", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{channels}x{layers}" for channels, layers in SHAPES]
    parser.add_argument("--shapes", nargs="*", default=names, metavar="CHANNELSxLAYERS", help="of random weights")
    parser.add_argument("--models", nargs="*", default=MODELS, help="trained")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--rounds", type=int, default=2, help="that count, after one that does not")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if native.library() is None:
        sys.exit(f"no native loop to time: {native.describe()}")
    flows = {name: partial(random_flow, config_of(*map(int, name.split("x")))) for name in options.shapes}
    flows |= {name: partial(jf.TarFlow.from_pretrained, name) for name in options.models}
    keys = [
        {"name": name, "trained": name in options.models, "batch_size": batch}
        for name in flows
        for batch in options.batch_sizes
    ]

    def run(key: Figures) -> Figures:
        flow = flows[key["name"]]().requires_grad_(False)
        return shape_of(flow) | measure(flow, key["batch_size"], options.rounds)

    complete(options.out, keys, run, show)


if __name__ == "__main__":
    keep_freed_memory()
    main()
