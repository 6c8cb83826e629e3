"""Times blocks of many sizes, and estimates models of the paper: `python -m benchmarks.regimes FILE ...`.

Each FILE is a result file; together they fill docs/regimes.md and docs/sizes.md. `regimes` (an hour): the exact loop
in native code and in PyTorch, and an encoding pass in float32 and in bfloat16, of blocks of random weights (T = 256,
C = 12) and of the bundled TarFlows. A solver that evaluates every token k times takes at least k passes.

The estimate is a product: seconds of one block of random weights in the shape of each model of the paper
(`paper-sizes`, half an hour), and sweeps of each block of the bundled TarFlows to 1e-3, with the fitted guess and
correction (`paper-sweeps`). A step of the original sampler is timed at mid context: it is linear in its context, so
that this is the mean of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import MODELS
from benchmarks.lib.models import latents, random_flow
from benchmarks.lib.process import without_native
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import to_json
from jacobiflow.comparison.baselines import GROWING_CACHE, CachedNetwork
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.models.tarflow import TarFlowBlock
from jacobiflow.utils.timing import time_interleaved

BATCH_SIZES = (1, 4, 16)
SHAPES = ((128, 2), (192, 4), (256, 2), (256, 4), (384, 4), (512, 4), (768, 8))  # channels, layers
TRAINED = ("fashion-p2", "emoji-p2", "digits-p1")
# Names in the result files.
EXACT_LOOP, LOOP_IN_PYTORCH, PASS, BF16_PASS = "fused loop", "eager loop", "pass", "pass in bfloat16"
ROUNDS = 2
WINDOWS = (16, 32, 64, 128)
STEPS = 16  # single tokens in a run, as many as in the smallest window
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-3
SAMPLES = 16  # Samples whose sweeps are counted.
BF16_SWEEPS = (0, 2, 3)

FLOWS: Mapping[str, Callable[[], jf.TarFlow]] = {
    f"{channels}x{layers}": partial(
        random_flow, jf.TarFlowConfig(3, 32, 2, channels=channels, num_blocks=1, layers_per_block=layers)
    )
    for channels, layers in SHAPES
} | {name: partial(jf.TarFlow.from_pretrained, name) for name in TRAINED}  # fmt: skip


def name_of(config: jf.TarFlowConfig) -> str:
    """The sizes on which the time of a block depends: channels, layers and tokens."""
    return f"{config.channels}x{config.layers_per_block}x{config.num_tokens}"


def run_name(dtype: str, size: int) -> str:
    return f"{dtype} x {size}"


def shape_of(flow: jf.TarFlow) -> Json:
    """The sizes of a block on which its time depends."""
    config = flow.config
    return {
        "channels": config.channels, "layers": config.layers_per_block, "tokens": config.num_tokens,
        "values": config.token_channels, "weights_mb": sum(p.nbytes for p in flow.blocks[-1].parameters()) / 1e6,
    }  # fmt: skip


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
    timings, results = time_interleaved(runs, ROUNDS)
    difference = float((results[EXACT_LOOP] - results[LOOP_IN_PYTORCH]).abs().max())
    return shape_of(flow) | {"seconds": to_json(timings), "max_difference": difference}


def block_keys() -> Iterator[Json]:
    for name in FLOWS:
        yield from ({"name": name, "trained": name in TRAINED, "batch_size": batch} for batch in BATCH_SIZES)


def in_passes(run: Json, name: str = EXACT_LOOP) -> float:
    """Seconds of a way in units of an encoding pass in float32, by the least of the rounds."""
    return float(run["seconds"][name]["min"] / run["seconds"][PASS]["min"])


def best_in_passes(run: Json) -> float:
    return min(in_passes(run, EXACT_LOOP), in_passes(run, LOOP_IN_PYTORCH))


def growing_cache_steps(block: TarFlowBlock, batch: int, context: int) -> Callable[[], None]:
    """`STEPS` steps of the original sampler, after `context` cached tokens."""
    stream = CachedNetwork(block, None, 1.0)
    channels = block.proj_in.out_features
    for layer in stream.layers:
        heads = layer.module.attention.num_heads
        for cached in (layer.keys, layer.values):
            cached += [torch.zeros(batch, heads, 1, channels // heads) for _ in range(context)]
    x = torch.zeros(batch, block.num_tokens, block.proj_in.in_features)

    def steps() -> None:
        for position in range(context, context + STEPS):
            stream.step(x, position)
        for layer in stream.layers:
            del layer.keys[context:], layer.values[context:]

    return steps


@torch.inference_mode()
def measure_paper_block(key: Json) -> Json:
    """Seconds of a step, of an update and of the exact loop's step."""
    config = next(preset.config for preset in jf.PRESETS.values() if name_of(preset.config) == key["name"])
    flow = random_flow(replace(config, num_blocks=1, num_classes=0))
    (z, _), block, length = latents(flow, key["batch_size"]), flow.blocks[0], config.num_tokens
    cache = block.init_cache(z)
    caches = {"float32": cache, "bfloat16": block.to_bf16(cache)}

    def update(dtype: str, size: int, count: int) -> None:
        start = (length - size) // 2
        for _ in range(count):
            block.update(z, z, start, start + size, caches[dtype])

    runs: dict[str, Callable[[], Any]] = {
        GROWING_CACHE: growing_cache_steps(block, len(z), length // 2),
        EXACT_LOOP: partial(exact_loop, block, z),
    }
    steps = {GROWING_CACHE: STEPS, EXACT_LOOP: length}  # the steps or updates in a run
    for size in (1, *(size for size in WINDOWS if size < length), length):
        for dtype in DTYPES:
            steps[run_name(dtype, size)] = count = max(STEPS // size, 1)
            runs[run_name(dtype, size)] = partial(update, dtype, size, count)
    timings, _ = time_interleaved(runs, ROUNDS)
    seconds = {
        name: {kind: value / steps[name] for kind, value in asdict(timing).items()} for name, timing in timings.items()
    }
    return shape_of(flow) | {"seconds": seconds}


def paper_keys() -> Iterator[Json]:
    for name in dict.fromkeys(name_of(preset.config) for preset in jf.PRESETS.values()):
        yield from ({"name": name, "batch_size": batch} for batch in BATCH_SIZES)


class Way(NamedTuple):
    """A way to sweep a block: `bf16_sweeps` of all tokens in bfloat16, then windows of `window`, 0 for all tokens."""

    bf16_sweeps: int
    window: int

    def __str__(self) -> str:
        if self.bf16_sweeps:
            return f"all, after {self.bf16_sweeps} in bfloat16"
        return f"windows of {self.window}" if self.window else "all tokens"


def count_sweeps(key: Json) -> Json:
    """Sweeps of each block and sample of a bundled model to `TOLERANCE` by every way, on fresh latents."""
    flow, folder = jf.TarFlow.from_pretrained(key["model"]).requires_grad_(False), MODELS / key["model"]
    report, tuned = jf.CalibrationReport.load(folder / "report.json"), jf.Tuning.load(folder / "tuning.json").blocks
    length, blocks = flow.config.num_tokens, []
    z, labels = latents(flow, SAMPLES)

    def solve(i: int, x: Tensor) -> Tensor:
        rows = []
        for way in (*(Way(count, 0) for count in BF16_SWEEPS), *(Way(0, size) for size in WINDOWS if size < length)):
            partition = jf.Window(way.window) if way.window else jf.Whole()
            stopping = jf.Tolerance(TOLERANCE)
            solver = jf.Solver(partition, tuned[i].guess, stopping, tuned[i].correction, way.bf16_sweeps)
            sweeps = jf.solve(flow.blocks[i], x, solver, labels).sample_sweeps - way.bf16_sweeps
            rows.append({**way._asdict(), "sweeps": sweeps.tolist()})
        blocks.append(rows)
        return exact_loop(flow.blocks[i], x, labels)

    flow.map_blocks_reversed(flow.prior_tokens(z), solve)
    return {"tokens": length, "tough": slow_blocks(report), "blocks": blocks[::-1]}


def slow_blocks(report: jf.CalibrationReport) -> list[int]:
    """The tough blocks by CRM that take more sweeps than every other block; CRM can call an easy block tough."""
    sweeps = report.mean_sweeps("noise", TOLERANCE)
    others = [count for i, count in enumerate(sweeps) if i not in report.tough_blocks]
    return [i for i in report.tough_blocks if sweeps[i] > max(others, default=0.0)]


def sweep_keys() -> list[Json]:
    return [{"model": name, "tolerance": TOLERANCE} for name in TRAINED]


def counted(model: Json, tough: bool) -> dict[Way, list[list[int]]]:
    """Sweeps of each tough block, or of each other block, by the ways that all of these were swept in."""
    blocks = [block for i, block in enumerate(model["blocks"]) if (i in model["tough"]) == tough]
    by_way = [{Way(run["bf16_sweeps"], run["window"]): run["sweeps"] for run in block} for block in blocks]
    return {way: [block[way] for block in by_way] for way in sorted(set.intersection(*map(set, by_way)))}


def mean_slowest(blocks: Sequence[Sequence[int]], batch: int) -> float:
    """The expected largest of `batch` draws, with replacement, from the counts of a block, as a mean over blocks.

    The i-th smallest of n is the largest of the draws with probability (i/n)^batch - ((i-1)/n)^batch.
    """
    ranks = torch.linspace(0, 1, len(blocks[0]) + 1, dtype=torch.float64)
    return float((torch.tensor(blocks).sort().values * ranks.pow(batch).diff()).sum(dim=1).mean())


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
    for model in sweeps["runs"]:
        name = model["model"]
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


def main() -> None:
    measure_files(__doc__, {
        "regimes": (block_keys, measure_block), "paper-sizes": (paper_keys, measure_paper_block),
        "paper-sweeps": (sweep_keys, count_sweeps),
    })  # fmt: skip


if __name__ == "__main__":
    keep_freed_memory()
    main()
