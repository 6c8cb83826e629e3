"""Where the exact loop is best, and where sweeps are: `python benchmarks/regimes.py`, an hour on two cores.

Times one block of random weights (32 x 32 x 3 pixels in patches of 2: T = 256, C = 12) over widths, depths and batch
sizes, and a block of our trained models in their own shapes: the exact loop in native code, the same in PyTorch, one
encoding pass in float32, and one in bfloat16. A solver that evaluates every token k times takes k passes at the least,
so an exact loop that takes k passes or more is what it beats.

Writes docs/results/regimes.json after each shape and batch size, and leaves out what it holds from the same machine, so
that a run can be interrupted. Runs take turns, `--repeats` rounds after one that does not count; fewer where that would
take more than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.files import write_json
from jacobiflow.flows.tarflow import TarFlowBlock
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine
from jacobiflow.memory import keep_freed_memory
from jacobiflow.native import SWITCH

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "regimes.json"
BATCH_SIZES = (1, 4, 16)
SHAPES = ((128, 2), (192, 4), (256, 2), (256, 4), (384, 4), (512, 4), (768, 8))
TRAINED = ("fashion-p2", "emoji-p2", "digits-p1")
FUSED, EAGER, PASS, LOW = "fused loop", "eager loop", "pass", "pass in bfloat16"
LOOP = jf.Solver(jf.Sequential())
MOST_SECONDS = 60  # of the rounds over one shape and batch size


def config_of(channels: int, layers: int) -> jf.TarFlowConfig:
    """A flow of one block."""
    return jf.TarFlowConfig(
        in_channels=3, image_size=32, patch_size=2, channels=channels, num_blocks=1, layers_per_block=layers
    )


def random_flow(config: jf.TarFlowConfig) -> jf.TarFlow:
    """Random weights. The output layer of a new block is zero: it is drawn too, small enough that nothing grows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = jf.TarFlow(config).eval().requires_grad_(False)
        flow.blocks[0].proj_out.weight.normal_(std=0.1 * config.channels**-0.5)
    return flow


def trained_flow(name: str) -> jf.TarFlow:
    """A trained model."""
    flow = jf.load(name)
    if not isinstance(flow, jf.TarFlow):
        sys.exit(f"{name} is no TarFlow")
    return flow.requires_grad_(False)


def fused(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> Tensor:
    """The exact loop in native code."""
    return jf.solve(block, z, LOOP, labels).x


def eager(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> Tensor:
    """The exact loop in PyTorch."""
    with patch.dict(os.environ, {SWITCH: "0"}):
        return jf.solve(block, z, LOOP, labels).x


def ways(block: TarFlowBlock, z: Tensor, labels: Tensor | None) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""

    @torch.inference_mode()
    def encode() -> None:
        block(z, labels)

    @torch.inference_mode()
    def encode_low() -> None:
        block.update(z, z, 0, z.shape[1], lowered)

    with torch.inference_mode():
        lowered = block.lower(block.init_cache(z, labels))
    return {
        FUSED: lambda: fused(block, z, labels),
        EAGER: lambda: eager(block, z, labels),
        PASS: encode,
        LOW: encode_low,
    }


def measure(flow: jf.TarFlow, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of the flow's last block by each way, and how far the loops are from each other."""
    config, block = flow.config, flow.blocks[-1]
    z = draw_latents(batch, config.num_tokens, config.token_channels, seed=1)
    labels = torch.arange(batch) % config.num_classes if config.num_classes else None
    runs = ways(block, z, labels)
    started = perf_counter()
    seconds, answers = interleave(runs, 1)
    rounds = min(repeats, int(2 * MOST_SECONDS / (perf_counter() - started)) - 1)
    if rounds > 1:
        seconds, _ = interleave(runs, rounds)
    return {
        "seconds": {name: asdict(timing) for name, timing in seconds.items()},
        "rounds": max(rounds, 1),
        "max_difference": float((answers[FUSED] - answers[EAGER]).abs().max()),
    }


def shape_of(flow: jf.TarFlow) -> dict[str, Any]:
    """What the time of a block depends on, beside the batch size."""
    config, block = flow.config, flow.blocks[-1]
    return {
        "channels": config.channels,
        "layers": config.layers_per_block,
        "tokens": config.num_tokens,
        "values": config.token_channels,
        "weights_mb": sum(parameter.nbytes for parameter in block.parameters()) / 1e6,
    }


def show(run: Mapping[str, Any]) -> None:
    """Print a run."""
    seconds = {name: timing["median"] for name, timing in run["seconds"].items()}
    in_passes = "  ".join(f"{name} {seconds[name] / seconds[PASS]:.2f}" for name in (FUSED, EAGER, LOW))
    print(f"{run['name']}, {run['weights_mb']:.1f} MB, batch {run['batch_size']}: {in_passes} passes", flush=True)


def fill_in(
    out: Path, keys: Iterable[dict[str, Any]], run: Callable[[dict[str, Any]], dict[str, Any]],
    say: Callable[[Mapping[str, Any]], None],
) -> None:  # fmt: skip
    """Add the figures of `run` for each key that the file lacks, or has from another machine; write after each."""
    if native.library() is None:
        sys.exit(f"no native loop to time: {native.describe()}")
    found: dict[str, Any] = {"machine": machine(), "native": native.describe(), "runs": []}
    if out.exists() and (kept := json.loads(out.read_text()))["machine"] == found["machine"]:
        found = kept
    out.parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        if not any(key.items() <= made.items() for made in found["runs"]):
            found["runs"].append(key | run(key))
            write_json(out, found)
            say(found["runs"][-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the file does not hold yet; write after each shape and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{channels}x{layers}" for channels, layers in SHAPES]
    parser.add_argument("--shapes", nargs="*", default=names, metavar="CHANNELSxLAYERS", help="of random weights")
    parser.add_argument("--models", nargs="*", default=TRAINED, help="trained")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--repeats", type=int, default=2, help="rounds that count, after one that does not")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    flows = {name: partial(random_flow, config_of(*map(int, name.split("x")))) for name in given.shapes}
    flows |= {name: partial(trained_flow, name) for name in given.models}
    keys = [
        {"name": name, "trained": name in given.models, "batch_size": batch}
        for name in flows
        for batch in given.batch_sizes
    ]

    def run(key: dict[str, Any]) -> dict[str, Any]:
        flow = flows[key["name"]]()
        return shape_of(flow) | measure(flow, key["batch_size"], given.repeats)

    fill_in(given.out, keys, run, show)


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
