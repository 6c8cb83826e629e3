"""Estimates the seconds of the paper's models on a CPU: `python -m benchmarks.paper_sizes`, half an hour.

The estimate is a product: seconds of one block of random weights in the shape of each model, unguided
(docs/results/paper-sizes.json), and sweeps of each block of the bundled TarFlows to 1e-3, with the fitted guess and
correction (docs/results/paper-sweeps.json). A step of the original sampler is timed at mid context: it is linear in
its context, so that this is the mean of all. Fills docs/sizes.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import MODELS, RESULTS, Json, complete, latents, origin, parser, random_flow
from benchmarks.regimes import BATCH_SIZES, EXACT_LOOP, ROUNDS, TRAINED, exact_loop, shape_of
from jacobiflow.comparison.baselines import GROWING_CACHE, CachedNetwork
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.models.tarflow import TarFlowBlock
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import time_interleaved

WINDOWS = (16, 32, 64, 128)
STEPS = 16  # single tokens in a run, as many as in the smallest window
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-3
SAMPLES = 16  # Samples whose sweeps are counted.
BF16_SWEEPS = (0, 2, 3)


def name_of(config: jf.TarFlowConfig) -> str:
    """The sizes on which the time of a block depends: channels, layers and tokens."""
    return f"{config.channels}x{config.layers_per_block}x{config.num_tokens}"


def run_name(dtype: str, size: int) -> str:
    return f"{dtype} x {size}"


def growing_cache_steps(block: TarFlowBlock, batch: int, context: int) -> Callable[[], None]:
    """`STEPS` steps of the original sampler, after `context` cached tokens."""
    stream = CachedNetwork(block, None, 1.0)
    channels = block.proj_in.out_features
    for layer in stream.layers:
        heads = layer.module.attention.num_heads
        for cached in (layer.keys, layer.values):
            cached += [torch.zeros(batch, heads, 1, channels // heads) for _ in range(context)]
    x = torch.zeros(batch, block.num_tokens, block.proj_in.in_features)

    @torch.inference_mode()
    def steps() -> None:
        for position in range(context, context + STEPS):
            stream.step(x, position)
        for layer in stream.layers:
            del layer.keys[context:], layer.values[context:]

    return steps


def runs_to_time(flow: jf.TarFlow, batch: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Runs by name, each with the number of steps or updates in it."""
    (z, _), block, length = latents(flow, batch), flow.blocks[0], flow.config.num_tokens
    with torch.inference_mode():
        cache = block.init_cache(z)
        caches = {"float32": cache, "bfloat16": block.to_bf16(cache)}

    @torch.inference_mode()
    def update(dtype: str, size: int, count: int) -> None:
        start = (length - size) // 2
        for _ in range(count):
            block.update(z, z, start, start + size, caches[dtype])

    runs: dict[str, tuple[Callable[[], Any], int]] = {
        GROWING_CACHE: (growing_cache_steps(block, batch, length // 2), STEPS),
        EXACT_LOOP: (partial(exact_loop, block, z, None), length),
    }
    for size in (1, *(size for size in WINDOWS if size < length), length):
        count = max(STEPS // size, 1)
        runs |= {run_name(dtype, size): (partial(update, dtype, size, count), count) for dtype in DTYPES}
    return runs


def measure(config: jf.TarFlowConfig, batch: int) -> Json:
    """Seconds of a step, of an update and of the exact loop's step."""
    flow = random_flow(replace(config, num_blocks=1, num_classes=0))
    runs = runs_to_time(flow, batch)
    timings, _ = time_interleaved({name: run for name, (run, _) in runs.items()}, ROUNDS)
    seconds = {
        name: {kind: value / runs[name][1] for kind, value in asdict(timing).items()}
        for name, timing in timings.items()
    }
    return shape_of(flow) | {"rounds": ROUNDS, "seconds": seconds}


class Way(NamedTuple):
    """A way to sweep a block: `bf16_sweeps` of all tokens in bfloat16, then windows of `window`, 0 for all tokens."""

    bf16_sweeps: int
    window: int

    def __str__(self) -> str:
        if self.bf16_sweeps:
            return f"all, after {self.bf16_sweeps} in bfloat16"
        return f"windows of {self.window}" if self.window else "all tokens"


def count_sweeps(flow: jf.TarFlow, report: jf.CalibrationReport, tuning: jf.Tuning, samples: int) -> Json:
    """Sweeps of each block and sample to `TOLERANCE` by every way, on fresh latents."""
    tuned, length, blocks = tuning.blocks, flow.config.num_tokens, []
    z, labels = latents(flow, samples)

    def solve(i: int, x: Tensor) -> Tensor:
        rows = []
        for way in (*(Way(count, 0) for count in BF16_SWEEPS), *(Way(0, size) for size in WINDOWS if size < length)):
            partition = jf.Window(way.window) if way.window else jf.Whole()
            stopping = jf.Tolerance(TOLERANCE)
            solver = jf.Solver(partition, tuned[i].guess, stopping, tuned[i].correction, way.bf16_sweeps)
            sweeps = jf.solve(flow.blocks[i], x, solver, labels).sample_sweeps - way.bf16_sweeps
            rows.append({**way._asdict(), "sweeps": sweeps.tolist()})
        blocks.append(rows)
        return jf.solve(flow.blocks[i], x, jf.Solver(jf.Sequential()), labels).x

    flow.map_blocks_reversed(flow.prior_tokens(z), solve)
    return {"tokens": length, "tough": slow_blocks(report), "blocks": blocks[::-1]}


def slow_blocks(report: jf.CalibrationReport) -> list[int]:
    """The tough blocks by CRM that take more sweeps than every other block; CRM can call an easy block tough."""
    sweeps = report.mean_sweeps("noise", TOLERANCE)
    others = [count for i, count in enumerate(sweeps) if i not in report.tough_blocks]
    return [i for i in report.tough_blocks if sweeps[i] > max(others, default=0.0)]


def counted(model: Json, tough: bool) -> dict[Way, list[list[int]]]:
    """Sweeps of each tough block, or of each other block, by the ways that all of these were swept in."""
    blocks = [block for i, block in enumerate(model["blocks"]) if (i in model["tough"]) == tough]
    by_way = [{Way(run["bf16_sweeps"], run["window"]): run["sweeps"] for run in block} for block in blocks]
    return {way: [block[way] for block in by_way] for way in sorted(set.intersection(*map(set, by_way)))}


def slowest_of(counts: Sequence[int], batch: int) -> float:
    """The expected largest of `batch` draws, with replacement, from n counts; their mean if `batch` is 1.

    The i-th smallest is the largest of the draws with probability (i/n)^batch - ((i-1)/n)^batch.
    """
    n = len(counts)
    return sum(c * ((i / n) ** batch - ((i - 1) / n) ** batch) for i, c in enumerate(sorted(counts), 1))


def mean_slowest(counts: Sequence[Sequence[int]], batch: int) -> float:
    return sum(slowest_of(block, batch) for block in counts) / len(counts)


def paper_sweeps(preset: jf.Preset) -> Counter[tuple[int, int]]:
    """Blocks of the paper's strategy by the tokens that they sweep together, and the number of such sweeps."""
    config = preset.config
    plan = jf.Strategy.parse(preset.strategy, num_blocks=config.num_blocks, num_tokens=config.num_tokens)
    blocks_by_sweeps = Counter[tuple[int, int]]()
    for solver in plan.solvers:
        size, sweeps = solver.partition.stop(0, config.num_tokens), solver.stopping.max_sweeps
        assert isinstance(sweeps, int)
        blocks_by_sweeps[size, sweeps * config.num_tokens // size] += 1
    return blocks_by_sweeps


def tough_blocks(preset: jf.Preset) -> int:
    """The number of blocks that the paper's strategy cuts into segments."""
    return sum(count for (size, _), count in paper_sweeps(preset).items() if size < preset.config.num_tokens)


def cheapest_sweeps(model: Json, tough: bool, length: int, batch: int, seconds: Mapping[str, float]) -> float:
    """Seconds of a block of `length` tokens by the cheapest way that the model was swept in, and its certificate.

    In a tough block convergence is a front, and a window passes as many tokens in a sweep as in the model's block: its
    sweeps are in proportion to the tokens. Elsewhere all tokens converge together, and sweeps of all of them are as
    many as in the model's block.
    """
    one_pass, choices = seconds[run_name("float32", length)], []
    for way, counts in counted(model, tough).items():
        sweeps = mean_slowest(counts, batch)
        if way.window:
            choices.append(sweeps * length / model["tokens"] * seconds[run_name("float32", way.window)])
        elif not tough:
            choices.append(way.bf16_sweeps * seconds[run_name("bfloat16", length)] + sweeps * one_pass)
    return min(choices) + one_pass


def estimates(run: Json, preset: jf.Preset, sweeps: Json) -> dict[str, float]:
    """Seconds of a model of the paper by every way, at the batch size of `run`; the paper's own strategy comes last."""
    seconds = {name: timing["min"] for name, timing in run["seconds"].items()}
    length, total, tough = preset.config.num_tokens, preset.config.num_blocks, tough_blocks(preset)
    loop = length * seconds[EXACT_LOOP]
    seconds_by_way = {
        GROWING_CACHE: total * length * seconds[GROWING_CACHE],
        "loop in PyTorch": total * length * seconds[run_name("float32", 1)],
        "exact loop": total * loop,
    }
    for name, model in sweeps["models"].items():
        hard, easy = (cheapest_sweeps(model, kind, length, run["batch_size"], seconds) for kind in (True, False))
        seconds_by_way[f"sweeps of {name}"] = tough * hard + (total - tough) * easy
        seconds_by_way[f"exact loop or sweeps of {name}"] = tough * min(hard, loop) + (total - tough) * min(easy, loop)
    for dtype in DTYPES:
        seconds_by_way[f"`{preset.strategy}` in {dtype}"] = sum(
            blocks * count * seconds[run_name(dtype, size)] for (size, count), blocks in paper_sweeps(preset).items()
        )
    return seconds_by_way


def runs_of(preset: jf.Preset, result: Json) -> list[Json]:
    """The timed runs in the shape of a model of the paper, by batch size."""
    shape = name_of(preset.config)
    return sorted((run for run in result["runs"] if run["name"] == shape), key=lambda run: run["batch_size"])


def show(run: Json) -> None:
    seconds = "  ".join(f"{name} {timing['min'] * 1e3:.2f}" for name, timing in run["seconds"].items())
    print(f"{run['name']}, batch {run['batch_size']}, ms: {seconds}", flush=True)


def main() -> None:
    parser(__doc__).parse_args()
    shapes = {name_of(preset.config): preset.config for preset in jf.PRESETS.values()}
    keys = [{"name": name, "batch_size": batch} for name in shapes for batch in BATCH_SIZES]
    complete(RESULTS / "paper-sizes.json", keys, lambda key: measure(shapes[key["name"]], key["batch_size"]), show)
    models = {}
    for name in TRAINED:
        flow, folder = jf.TarFlow.from_pretrained(name).requires_grad_(False), MODELS / name
        report, tuning = jf.CalibrationReport.load(folder / "report.json"), jf.Tuning.load(folder / "tuning.json")
        models[name] = count_sweeps(flow, report, tuning, SAMPLES)
    write_json(RESULTS / "paper-sweeps.json", origin(count_sweeps) | {"tolerance": TOLERANCE, "models": models})


if __name__ == "__main__":
    keep_freed_memory()
    main()
