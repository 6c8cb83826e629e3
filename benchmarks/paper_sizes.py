"""What the paper's models would take on a CPU, factor one: `python benchmarks/paper_sizes.py`, half an hour.

Times one block of random weights in each shape of the GS-Jacobi paper's four models, at batch 1, 4 and 16, unguided:

- a step of the growing-cache loop of the original code at mid context, the mean over `STEPS` of them;
- the exact loop in native code over all tokens, as seconds of one of its steps;
- `update` of a run of tokens in the middle of the sequence, in float32 and in bfloat16 (`block.lower(cache)`): one
  token, which is a step of our loop in PyTorch, windows of `WINDOWS`, and all tokens, which is a whole pass.

A step is linear in its context, so that the step at mid context is the mean of all. The time of a block hardly depends
on C, the values in a token: AFHQ's model shares its shape with that of unconditional ImageNet.

Factor two, how many sweeps a trained block needs, is in the bundled reports; `paper_sizes_page.py` multiplies. Writes
docs/results/paper-sizes.json after each shape and batch size, and leaves out what it holds from the same machine, so
that a run can be interrupted. Runs take turns, `--repeats` rounds after one that does not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from regimes import BATCH_SIZES, FUSED, fill_in, fused, random_flow, shape_of

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE
from jacobiflow.baselines.growing_cache import Stream
from jacobiflow.flows.tarflow import TarFlowBlock
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave
from jacobiflow.memory import keep_freed_memory

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "paper-sizes.json"
WINDOWS = (16, 32, 64, 128)
STEPS = 16  # single tokens in a run, as many as in the smallest window
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def name_of(config: jf.TarFlowConfig) -> str:
    """What the time of a block depends on: channels, layers and tokens."""
    return f"{config.channels}x{config.layers_per_block}x{config.num_tokens}"


SHAPES: Mapping[str, jf.TarFlowConfig] = {name_of(preset.config): preset.config for preset in jf.PRESETS.values()}


def run_name(dtype: str, size: int) -> str:
    """A run of `size` tokens in the results."""
    return f"{dtype} x {size}"


def growing_steps(block: TarFlowBlock, batch: int, context: int) -> Callable[[], None]:
    """`STEPS` steps of the growing-cache loop, from so many cached tokens on."""
    stream = Stream(block, None, 1.0)
    channels = block.proj_in.out_features
    for layer in stream.layers:
        heads = layer.module.attention.num_heads
        for cached in (layer.keys, layer.values):
            cached += [torch.zeros(batch, heads, 1, channels // heads) for _ in range(context)]
    x = torch.zeros(batch, block.num_tokens, block.proj_in.in_features)

    @torch.inference_mode()
    def steps() -> None:
        for position in range(context, context + STEPS):
            stream.feed(x, position)
        for layer in stream.layers:
            del layer.keys[context:], layer.values[context:]

    return steps


def ways(flow: jf.TarFlow, batch: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, by name, and how many steps or runs that is."""
    config, block = flow.config, flow.blocks[0]
    length = config.num_tokens
    z = draw_latents(batch, length, config.token_channels, seed=1)
    with torch.inference_mode():
        cache = block.init_cache(z)
        caches = {"float32": cache, "bfloat16": block.lower(cache)}

    def runs(dtype: str, size: int, count: int) -> Callable[[], None]:
        start = (length - size) // 2

        @torch.inference_mode()
        def update() -> None:
            for _ in range(count):
                block.update(z, z, start, start + size, caches[dtype])

        return update

    found: dict[str, tuple[Callable[[], Any], int]] = {
        GROWING_CACHE: (growing_steps(block, batch, length // 2), STEPS),
        FUSED: (lambda: fused(block, z, None), length),
    }
    for size in (1, *(size for size in WINDOWS if size < length), length):
        count = max(STEPS // size, 1)
        found |= {run_name(dtype, size): (runs(dtype, size, count), count) for dtype in DTYPES}
    return found


def measure(config: jf.TarFlowConfig, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step, of a run and of a pass."""
    flow = random_flow(replace(config, num_blocks=1, num_classes=0))
    timed = ways(flow, batch)
    seconds, _ = interleave({name: run for name, (run, _) in timed.items()}, repeats)
    return shape_of(flow) | {
        "rounds": repeats,
        "seconds": {
            name: {kind: value / timed[name][1] for kind, value in asdict(timing).items()}
            for name, timing in seconds.items()
        },
    }


def show(run: Mapping[str, Any]) -> None:
    """Print a run."""
    seconds = "  ".join(f"{name} {timing['min'] * 1e3:.2f}" for name, timing in run["seconds"].items())
    print(f"{run['name']}, batch {run['batch_size']}, ms: {seconds}", flush=True)


def main(arguments: Sequence[str] | None = None, shapes: Mapping[str, jf.TarFlowConfig] = SHAPES) -> None:
    """Measure what the file does not hold yet; write after each shape and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*shapes], default=[*shapes], help="channels, layers, tokens")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--repeats", type=int, default=2, help="rounds that count, after one that does not")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    keys = [{"name": name, "batch_size": batch} for name in given.shapes for batch in given.batch_sizes]

    def run(key: dict[str, Any]) -> dict[str, Any]:
        return measure(shapes[key["name"]], key["batch_size"], given.repeats)

    fill_in(given.out, keys, run, show)


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
