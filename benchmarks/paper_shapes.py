"""Times the GS-Jacobi paper's four models in shape, on a GPU: `python benchmarks/paper_shapes.py`.

One block of random weights is timed, and a model's seconds are the sum over its eight blocks. Random weights give the
time of a step, not how many sweeps a trained model needs: those are taken from the paper's tables 3 and 4. A rate is
how many times faster than the growing-cache loop of the original code a way to sample is, on the same device, and the
target is twice the rate that the paper reports. `fashion-p2` is timed as it is, with its trained weights.

Ways to sample a model, each a sum over its blocks of the parts that are timed:

- *growing cache*, *sequential*: one token at a time, as the original code does it and over a preallocated cache.
- *sequential, CUDA graphs*: the same, a graph of kernels a token, as the library does. On a CUDA device only.
- *GS-Jacobi*: the paper's fastest strategy within 1% of FID, segments in its stacked blocks and whole sweeps elsewhere.
- *window*: a window in the stacked blocks, see `matched`, whole sweeps elsewhere, and a certificate for every block.
- *window, bfloat16 first*: these sweeps by the network in bfloat16, then in every block one more of all tokens in
  float32, and the certificate.
- *encoding pass*: each block evaluated once, unguided: what no solver beats.

Denoising, which is the same for all, is left out. Writes docs/results/paper-shapes.json after each shape and batch
size, and leaves out what it holds from the same machine, so that a run can be interrupted. After a warm-up, every run
is timed `--repeats` times; from batch 64 on, and for the growing-cache loop, once.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE, SEQUENTIAL
from jacobiflow.baselines.growing_cache import growing_cache_sample
from jacobiflow.experiments.speed import ENCODING_PASS, compare
from jacobiflow.files import write_json
from jacobiflow.flows.base import AffineFrontPerSample, KeepsNothing
from jacobiflow.guidance import guided
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing, interleave, machine
from jacobiflow.memory import keep_freed_memory

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "paper-shapes.json"
BATCH_SIZES = (1, 16, 64)
LARGE = 64  # samples from which a run takes seconds, and is timed once
GRAPHS = "sequential, CUDA graphs"
CERTIFICATE = "certificate"
CHORD_TOKENS, CHORD_STEPS = 24, 100
WHOLE_SWEEP = jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(1))
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # between loops that compute the same by other kernels
NOTES = (
    "seconds of a model are sums over its blocks of the seconds of one block of random weights",
    "random weights give the time of a step, not the number of sweeps: that is the paper's",
    "a rate is over the growing-cache loop on the same device; the target is twice the paper's rate",
)


@dataclass(frozen=True)
class Shape:
    """A model of the paper, and its speed-up there by the strategy of `preset`."""

    preset: jf.Preset
    paper_rate: float

    @property
    def guidance(self) -> jf.Guidance:
        """As the paper samples the model."""
        preset = self.preset
        return jf.Guidance(preset.guidance_weight, preset.annealed, attn_temperature=preset.attn_temperature)

    @property
    def solvers(self) -> Counter[jf.Solver]:
        """The solvers of the paper's strategy, and how many blocks each solves; all sweeps, none is stopped early."""
        config = self.preset.config
        plan = jf.Strategy.parse(self.preset.strategy, num_blocks=config.num_blocks, num_tokens=config.num_tokens)
        return Counter(replace(s, stopping=replace(s.stopping, ebound=None)) for s in plan.solvers)


RATES = {"img128cond": 4.53, "afhq": 5.32, "img64uncond": 2.96, "img64cond": 2.51}
SHAPES: Mapping[str, Shape] = {name: Shape(jf.PRESETS[name], rate) for name, rate in RATES.items()}
TRAINED: Mapping[str, Sequence[str]] = {"fashion-p2": ("jacobi", "[7-8-14-10]", "window:32")}


class Still:
    """A block that changes nothing, to count what a solver evaluates."""

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> None:
        """There is nothing to keep."""

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: None) -> Tensor:
        """z[:, start:stop]."""
        return z[:, start:stop]


def evaluations(solver: jf.Solver, num_tokens: int) -> int:
    """Tokens that `solver`, which stops after a number of sweeps, evaluates in solving so many."""
    return jf.solve(Still(), torch.zeros(1, num_tokens, 1), solver).token_evaluations


@cache
def matched(solver: jf.Solver, num_tokens: int) -> jf.Solver:
    """A window that evaluates tokens as often as `solver` does, if that has segments; else `solver`.

    `MaxSweeps(J)` moves a window of n tokens by n every J sweeps, just as it moves segments of n. But the first J
    tokens of a segment are done earlier, by Proposition 1 of the paper, where a window goes on to the tokens behind. So
    the window, as long as a segment, gets the smallest number of sweeps for which it evaluates no fewer tokens.
    """
    if not isinstance(solver.partition, jf.Segments):
        return solver
    window = jf.Window(num_tokens // solver.partition.count)
    tried = (jf.Solver(window, stopping=jf.MaxSweeps(sweeps)) for sweeps in range(1, num_tokens + 1))
    least = evaluations(solver, num_tokens)
    return next(found for found in tried if evaluations(found, num_tokens) >= least)


def name_of(solver: jf.Solver) -> str:
    """Its partition and number of sweeps."""
    return f"{solver.partition} x {solver.stopping.max_sweeps}"


@dataclass(frozen=True)
class Launched(KeepsNothing):
    """`block`, of which a solver knows only how to evaluate it, so that every kernel is launched by itself."""

    block: AffineFrontPerSample

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> Any:
        """That of `block`."""
        return self.block.init_cache(z, context)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        """That of `block`."""
        return self.block.update(x, z, start, stop, cache)


class FrontPerSample(Launched):
    """Evaluated as where every sample has a front of its own, as a window's samples have under a tolerance."""

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        """g(x)[:, start:stop], the start given by sample."""
        starts = torch.full((len(x),), start, device=x.device)
        return self.block.update_at(x, z, starts, stop - start, stop, cache)


class Part:
    """A run to time, called by `interleave`: first to warm up, by `warm_up` where that is given, then in full.

    `result` is what the last full run returned. `reason` says why there is no time: once memory has run out, calls do
    nothing.
    """

    def __init__(self, run: Callable[[], Any], warm_up: Callable[[], Any] | None = None) -> None:
        self.run, self.next = run, warm_up or run
        self.result: Any = None
        self.reason: str | None = None

    def __call__(self) -> None:
        if self.reason is not None:
            return
        try:
            self.result = self.next()
        except torch.OutOfMemoryError as error:
            self.reason = ". ".join(str(error).split(". ")[:2])
            self.result = None
        self.next = self.run

    def to_json(self, timing: Timing) -> dict[str, Any]:
        """Its seconds, or why there are none, and what a solver computed."""
        value: dict[str, Any] = {"seconds": None if self.reason else asdict(timing)}
        if self.reason:
            value["reason"] = self.reason
        elif isinstance(self.result, jf.Solution):
            value["network_calls"] = self.result.network_calls
            value["evaluations_per_token"] = self.result.token_evaluations / self.result.x[..., 0].numel()
        return value


@dataclass(frozen=True)
class Problem:
    """A flow of one block, latents (B, T, C) and labels."""

    flow: jf.TarFlow
    z: Tensor
    labels: Tensor | None
    guidance: jf.Guidance

    @classmethod
    def draw(cls, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        """Random weights. The output layer of a new block is zero: it is drawn too, small enough that nothing grows."""
        config = replace(shape.preset.config, num_blocks=1)
        with torch.random.fork_rng(devices=[]):  # on the host, so that weights are the same everywhere
            torch.manual_seed(0)
            flow = jf.TarFlow(config).eval().requires_grad_(False)
            flow.blocks[0].proj_out.weight.normal_(std=0.1 * config.channels**-0.5)
        z = draw_latents(batch, config.num_tokens, config.token_channels, seed=1).to(device)
        labels = torch.arange(batch, device=device) % config.num_classes if config.num_classes else None
        return cls(flow.to(device, dtype), z, labels, shape.guidance)

    @property
    def block(self) -> AffineFrontPerSample:
        """The block, under guidance."""
        return cast(AffineFrontPerSample, guided(self.flow.blocks[0], self.guidance))

    def solve(self, solver: jf.Solver) -> Part:
        """The block solved; to warm up, a sweep of every run."""
        apart = isinstance(solver.partition, jf.Window) and len(self.z) > 1
        block = FrontPerSample(self.block) if apart else self.block
        once = replace(solver, stopping=jf.MaxSweeps(1))
        return Part(*(partial(jf.solve, block, self.z, s, self.labels) for s in (solver, once)))

    def growing_cache(self) -> Tensor:
        """The block solved as the original code does."""
        images = growing_cache_sample(self.flow, self.z, self.labels, self.guidance)
        return self.flow.patchify(images)

    def sequential(self, graphs: bool) -> Part:
        """The block solved token by token, its kernels launched one by one, or as graphs."""
        block = self.block if graphs else Launched(self.block)
        return Part(partial(jf.solve, block, self.z, jf.Solver(jf.Sequential()), self.labels))

    def encode(self) -> None:
        """The block evaluated once."""
        with torch.inference_mode():
            self.flow.encode(self.flow.unpatchify(self.z), self.labels)

    def chord(self, size: int) -> Part:
        """`CHORD_STEPS` chord steps on a run of `size` tokens."""
        channels = self.z.shape[2]
        step = jf.Chord(1e-3 * torch.randn(CHORD_TOKENS, channels, channels, device=self.z.device))
        x, g = self.z[:, :size], 0.5 * self.z[:, :size]

        def steps() -> None:
            for _ in range(CHORD_STEPS):
                step(x, g)

        return Part(steps)


def in_bfloat16(solver: jf.Solver) -> str:
    """Name of the part in which the network runs in bfloat16."""
    return f"{name_of(solver)}, bfloat16"


def parts_of(problem: Problem, paper: Counter[jf.Solver]) -> dict[str, Part]:
    """What is timed of one block, by name."""
    length = problem.z.shape[1]
    ours = [matched(solver, length) for solver in paper]
    parts: dict[str, Part] = {}
    if problem.z.device.type == "cuda":
        parts[GRAPHS] = problem.sequential(graphs=True)
    parts |= {
        GROWING_CACHE: Part(problem.growing_cache),
        SEQUENTIAL: problem.sequential(graphs=False),
        **{name_of(solver): problem.solve(solver) for solver in (*paper, *ours, WHOLE_SWEEP)},
        CERTIFICATE: Part(partial(jf.certify, problem.block, problem.z, problem.z, problem.labels)),
        ENCODING_PASS: Part(problem.encode),
    }
    if problem.flow.var.dtype == torch.float32:
        coarse = replace(problem, flow=deepcopy(problem.flow).bfloat16())
        parts |= {in_bfloat16(solver): coarse.solve(solver) for solver in ours}
    return parts


def sums(shape: Shape) -> dict[str, Counter[str]]:
    """How often each part comes in a model, by the way to sample it."""
    blocks, length = shape.preset.config.num_blocks, shape.preset.config.num_tokens
    paper, window, coarse = Counter[str](), Counter({CERTIFICATE: blocks}), Counter({CERTIFICATE: blocks})
    for solver, count in shape.solvers.items():
        paper[name_of(solver)] += count
        window[name_of(matched(solver, length))] += count
        coarse[in_bfloat16(matched(solver, length))] += count
    coarse[name_of(WHOLE_SWEEP)] += blocks
    every = {name: Counter({name: blocks}) for name in (GROWING_CACHE, SEQUENTIAL, GRAPHS)}
    every |= {f"GS-Jacobi {shape.preset.strategy}": paper, "window": window, "window, bfloat16 first": coarse}
    return every | {ENCODING_PASS: Counter({ENCODING_PASS: blocks})}


def compare_loops(parts: Mapping[str, Part], dtype: torch.dtype) -> dict[str, float]:
    """How far the other loops are from the sequential answer; one that is beyond rounding has no time."""
    exact, found = parts[SEQUENTIAL].result, {}
    for name in (GROWING_CACHE, GRAPHS):
        answer = parts[name].result if name in parts else None
        if isinstance(exact, jf.Solution) and answer is not None:
            found[name] = float((getattr(answer, "x", answer) - exact.x).abs().max())
            if not found[name] <= ROUNDING[dtype]:
                parts[name].reason = f"differs from the sequential answer by {found[name]:.1e}"
    return found


def combine(shape: Shape, parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of a model by each way to sample it, from those of its parts, and the rate over the growing cache.

    Both are `None` where a part has no time, and `reason` says why; a way with a part that was not tried is left out.
    """
    rows: list[dict[str, Any]] = []
    for method, counts in sums(shape).items():
        if not counts.keys() <= parts.keys():
            continue
        reasons = [f"{name}: {parts[name]['reason']}" for name in counts if parts[name]["seconds"] is None]
        seconds = None if reasons else sum(n * parts[name]["seconds"]["median"] for name, n in counts.items())
        baseline = rows[0]["seconds"] if rows else seconds
        rate = baseline / seconds if baseline and seconds else None
        row = {"method": method, "parts": dict(counts), "seconds": seconds, "rate": rate}
        rows.append(row | ({"reason": "; ".join(reasons)} if reasons else {}))
    return rows


def measure(shape: Shape, batch: int, dtype: torch.dtype, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the parts of one block, and of a model by them."""
    problem, length = Problem.draw(shape, batch, dtype, device), shape.preset.config.num_tokens
    parts = parts_of(problem, shape.solvers)
    runs = [matched(solver, length).partition for solver in shape.solvers]
    chords = {f"chord in {run}": problem.chord(run.size) for run in runs if isinstance(run, jf.Window)}
    others = {name: part for name, part in (parts | chords).items() if name != GROWING_CACHE}
    seconds, _ = interleave(others, 1 if batch >= LARGE else repeats, device)
    seconds |= interleave({GROWING_CACHE: parts[GROWING_CACHE]}, 1, device)[0]
    differences = compare_loops(parts, dtype)
    timed = {name: part.to_json(seconds[name]) for name, part in parts.items()}
    channels = shape.preset.config.token_channels
    kernel = {"tokens": CHORD_TOKENS, "kernel_bytes": CHORD_TOKENS * channels**2 * 4, "steps": CHORD_STEPS}
    return {
        "paper_rate": shape.paper_rate, "target_rate": 2 * shape.paper_rate, "parts": timed,
        "differences": differences, "rows": combine(shape, timed),
        "chords": {name: kernel | part.to_json(seconds[name]) for name, part in chords.items()},
    }  # fmt: skip


def measure_trained(
    name: str, strategies: Sequence[str], batch: int, dtype: torch.dtype, repeats: int, device: torch.device
) -> dict[str, Any]:
    """A trained model, all its blocks, unguided; uncertified, for the error is measured."""
    flow = jf.load(name, device=device, dtype=dtype)
    config = flow.config
    z = draw_latents(batch, config.num_tokens, config.token_channels, seed=1)
    labels = torch.arange(batch) % config.num_classes if config.num_classes else None
    draw = partial(jf.sample, flow, labels=labels, latents=z, certify=False, progress=False)
    runs = {strategy: partial(draw, strategy=strategy) for strategy in strategies}
    return compare(flow, z, labels, runs, repeats=repeats).to_json()


def settings_of(name: str, shapes: Mapping[str, Shape], trained: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What makes a run another one, beside its batch size, dtype and machine."""
    if name in trained:
        return {"strategies": list(trained[name])}
    preset = shapes[name].preset
    return {
        "config": asdict(preset.config),
        "strategy": preset.strategy,
        "guidance": asdict(shapes[name].guidance),
        "blocks_timed": 1,
    }


def machine_of(device: torch.device) -> dict[str, Any]:
    """`machine`, and whether float32 is rounded to TF32 in matrix products and in convolutions."""
    tf32 = {"matmul": torch.get_float32_matmul_precision() != "highest", "convolution": torch.backends.cudnn.allow_tf32}
    return machine(device) | {"tf32": tf32}


def show(run: Mapping[str, Any]) -> None:
    """Print the rows of a run."""
    print(f"{run['shape']}, batch {run['batch_size']}, {run['dtype']}")
    for row in run["rows"]:
        name = row.get("method", row.get("strategy"))
        seconds = row["seconds"]["median"] if isinstance(row["seconds"], dict) else row["seconds"]
        rate = row["speed_up"][GROWING_CACHE] if "speed_up" in row else row["rate"]
        cost = row["reason"] if seconds is None else f"{seconds:9.3f} s"
        print(f"  {name:38s} {cost}" + ("" if rate is None else f" {rate:7.2f}x"), flush=True)
    if "target_rate" in run:
        print(f"  target {run['target_rate']:.1f}x, the paper's {run['paper_rate']:.2f}x on its device", flush=True)


def main(
    arguments: Sequence[str] | None = None, shapes: Mapping[str, Shape] = SHAPES,
    trained: Mapping[str, Sequence[str]] = TRAINED,
) -> None:  # fmt: skip
    """Measure what the file does not hold yet; write after each shape and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*shapes, *trained]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count, after one that does not")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the network")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    found: dict[str, Any] = {"notes": NOTES, "runs": []}
    if given.out.exists():
        found = json.loads(given.out.read_text())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print("\n".join(NOTES))
    for name in given.shapes:
        for batch in given.batch_sizes:
            key = {"shape": name, "batch_size": batch, "dtype": given.dtype, "machine": machine_of(device),
                   "settings": settings_of(name, shapes, trained)}  # fmt: skip
            if any(key.items() <= run.items() for run in found["runs"]):
                continue
            if name in trained:
                run = measure_trained(name, trained[name], batch, dtype, given.repeats, device)
            else:
                run = measure(shapes[name], batch, dtype, given.repeats, device)
            found["runs"].append(key | run)
            write_json(given.out, found)
            show(found["runs"][-1])


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
