"""Every way to sample from `fashion-p2`, ours and others', in interleaved runs: `python benchmarks/performance.py`.

Writes docs/results/performance.json. Needs an otherwise idle machine and about half an hour on two cores; started again
it measures what the file lacks.

1. Grid: every setting of every sampler: seconds (the faster of two runs; from 16 on of one), error, calls. At 16 and 64
   settings are left out that were wrong by more than 1e-2 at the batch size before, or took 1.3 times the seconds of
   their sampler's fastest one within 1e-3.
2. Final: of each sampler the fastest setting whose error is at most 1e-3, the most accurate where none is, and the
   published one, all in turn with `auto`, with its report and without, the loops, and the loop without native code.
3. Tough: block 7 alone, by plain windows and by windows with the fitted guess and chord.
4. Counts: network calls and token evaluations at a tolerance of 1e-2.
5. Guided: `auto` and the baselines under guidance of weight 1, annealed.
6. Profile: seconds by kind of operation, of the loops in PyTorch and of Jacobi iteration; the rate of the machine's
   matrix products.
7. Compiled: a sweep of all tokens as it is and by `torch.compile`, and the seconds that compiling took.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from without import ROWS, Without, pieces

import jacobiflow as jf
from jacobiflow.baselines import GRIDS, GROWING_CACHE, PEERS, gs_jacobi_grid
from jacobiflow.baselines.growing_cache import growing_cache_sample
from jacobiflow.experiments.speed import compare
from jacobiflow.files import write_json
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine, paired_error
from jacobiflow.memory import keep_freed_memory
from jacobiflow.strategy import auto

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
MODEL = "fashion-p2"
BATCHES = (1, 4, 16, 64)
SMALL_BATCHES = (1, 4, 16)  # of the parts that say little, or take too long, at 64
REPEATS = {1: 9, 4: 7, 16: 5, 64: 3}
GRID_REPEATS = {1: 2, 4: 2, 16: 1, 64: 1}
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
ERROR = 1e-3
WRONG, SLOW = 1e-2, 1.3
TOUGH = 7
GUIDANCE = jf.Guidance(1.0)
EAGER = "sequential, in PyTorch"
IN_PYTORCH = Without(native=False)
WINDOWS = (8, 16, 24, 32, 48, 64, 96, 196)

KINDS = {
    "matrix products": ("addmm", "aten::mm", "bmm"),
    "attention": ("scaled_dot_product",),
    "GELU, norms, sums": ("gelu", "layer_norm", "aten::add", "addcmul", "aten::exp"),
    "copies": ("copy_", "aten::cat", "index", "gather", "scatter", "aten::fill_", "zero_"),
}

Run = Callable[[Tensor, Tensor], Any]  # of latents and labels; gives images, network_calls, token_evaluations


def latents(flow: jf.TarFlow, batch: int) -> tuple[Tensor, Tensor]:
    """Latents and balanced labels."""
    z = draw_latents(batch, flow.config.num_tokens, flow.config.token_channels, seed=1)
    return z, torch.arange(batch) % flow.config.num_classes


def draw(
    flow: jf.TarFlow, z: Tensor, labels: Tensor, strategy: str | jf.Strategy, guidance: jf.Guidance | None = None,
    certify: bool = False,
) -> jf.Samples:  # fmt: skip
    """One run of the library."""
    return jf.sample(
        flow, latents=z, labels=labels, strategy=strategy, guidance=guidance, certify=certify, progress=False
    )


def settings(flow: jf.TarFlow, report: jf.Report) -> dict[str, dict[str, Run]]:
    """By sampler and setting, the published setting first."""
    found: dict[str, dict[str, Run]] = {
        name: {
            ", ".join(f"{key} {value}" for key, value in setting.items()): partial(_peer, flow, PEERS[name], setting)
            for setting in grid
        }
        for name, grid in GRIDS.items()
    }
    found["GS-Jacobi"] = {
        text: partial(_ours, flow, jf.Strategy.parse(text, replace(report, tuning=None)))
        for text in gs_jacobi_grid(report)
    }
    found["window"] = {
        f"window:{size} to {tolerance:g}": partial(
            _ours, flow, jf.Strategy.uniform(jf.Solver(jf.Window(size), stopping=jf.Tolerance(tolerance)), 8)
        )
        for size in (32, flow.config.num_tokens)
        for tolerance in TOLERANCES
    }
    return found


def _peer(flow: jf.TarFlow, sampler: Callable[..., Any], setting: Mapping[str, Any], z: Tensor, labels: Tensor) -> Any:
    return sampler(flow, z, labels, **setting)


def _ours(flow: jf.TarFlow, strategy: str | jf.Strategy, z: Tensor, labels: Tensor) -> jf.Samples:
    return draw(flow, z, labels, strategy)


def grid(flow: jf.TarFlow, every: Mapping[str, Mapping[str, Run]], batch: int) -> list[dict[str, Any]]:
    """A row per setting, and one per tolerance of `auto`."""
    z, labels = latents(flow, batch)
    exact = draw(flow, z, labels, "sequential").images
    runs = {(name, setting): run for name, row in every.items() for setting, run in row.items()}
    plans = {tolerance: auto(flow, batch, tolerance) for tolerance in TOLERANCES}
    runs |= {("auto", f"to {tolerance:g}"): partial(_ours, flow, plan) for tolerance, plan in plans.items()}
    rows = []
    for (name, setting), run in runs.items():
        seconds = []
        for _ in range(GRID_REPEATS[batch]):
            started = time.perf_counter()
            answer = run(z, labels)
            seconds.append(time.perf_counter() - started)
        rows.append({"sampler": name, "setting": setting, "seconds": min(seconds), **_answer(answer, exact)})
        print(f"  {batch:3d} {name} {setting}: {min(seconds):.3f} s, error {rows[-1]['max_error']:.1e}", flush=True)
    return rows


def promising(name: str, settings: Mapping[str, Run], rows: list[dict[str, Any]]) -> dict[str, Run]:
    """The published setting of a sampler, and those that were neither far off nor slow in `rows`, of fewer samples."""
    own = {row["setting"]: row for row in rows if row["sampler"] == name}
    fastest = min((row["seconds"] for row in own.values() if row["max_error"] <= ERROR), default=math.inf)
    return {
        setting: run
        for i, (setting, run) in enumerate(settings.items())
        if i == 0
        or (setting in own and own[setting]["max_error"] <= WRONG and own[setting]["seconds"] <= SLOW * fastest)
    }


def best(rows: list[dict[str, Any]], name: str) -> str:
    """The fastest setting of a sampler within the error; the most accurate where none is."""
    own = [row for row in rows if row["sampler"] == name]
    within = [row for row in own if row["max_error"] <= ERROR]
    chosen = min(within, key=lambda row: row["seconds"]) if within else min(own, key=lambda row: row["max_error"])
    return str(chosen["setting"])


def final(
    flow: jf.TarFlow, report: jf.Report, every: Mapping[str, Mapping[str, Run]], rows: list[dict[str, Any]], batch: int
) -> dict[str, Any]:
    """One interleaved run of the best and the published settings with `auto` and the baselines."""
    z, labels = latents(flow, batch)
    bare = jf.TarFlow.from_pretrained(MODEL).requires_grad_(False)
    bare.report_files = ()
    plan = auto(flow, batch)
    plans = {"auto": plan, "auto, certified": plan, "auto, without a report": auto(bare, batch)}
    runs: dict[str, Callable[[], Any]] = {
        name: partial(draw, flow, z, labels, made, None, name == "auto, certified") for name, made in plans.items()
    }
    for name, less in ROWS.items():
        plans[name] = less.plan(flow, report, batch)
        runs[name] = partial(less.run, partial(draw, flow, z, labels, plans[name]))
    runs[EAGER] = partial(IN_PYTORCH.run, partial(draw, flow, z, labels, "sequential"))
    for name, row in every.items():
        names = {best(rows, name)} | ({next(iter(row))} if name != "window" else set())
        runs |= {f"{name} | {setting}": partial(_images, row[setting], z, labels) for setting in sorted(names)}
    found = compare(flow, z, labels, runs, repeats=REPEATS[batch]).to_json()
    exact = draw(flow, z, labels, "sequential").images
    for entry in found["rows"]:
        name, _, setting = entry["strategy"].partition(" | ")
        if name in plans:
            entry["plan"] = pieces(plans[name])
        if setting:
            entry |= _answer(every[name][setting](z, labels), exact)
    prediction = None if plan.prediction is None else asdict(plan.prediction)
    return found | {"prediction": prediction, "plan": plan.to_json()}


def _images(run: Run, z: Tensor, labels: Tensor) -> Tensor:
    images: Tensor = run(z, labels).images
    return images


def _answer(answer: Any, exact: Tensor) -> dict[str, Any]:
    error = paired_error(answer.images, exact)
    return {
        "max_error": error.max, "mean_error": error.mean,
        "network_calls": answer.network_calls, "token_evaluations": answer.token_evaluations,
    }  # fmt: skip


def tough(flow: jf.TarFlow, report: jf.Report, batch: int) -> list[dict[str, Any]]:
    """Seconds of block 7 by windows, plain and tuned, each at its largest tolerance that gives the same error."""
    z, labels = latents(flow, batch)
    block, tuned = flow.blocks[TOUGH], _tuning(report).blocks[TOUGH]
    z = block.permutation(z * flow.var.sqrt())
    exact = jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x
    solvers: dict[tuple[str, int], jf.Solver] = {}
    for size in WINDOWS:
        for kind, guess, correction in (
            ("plain", report.guess(TOUGH), jf.Plain()), ("chord", tuned.guess, tuned.correction),
        ):  # fmt: skip
            for tolerance in (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6):
                solver = jf.Solver(jf.Window(size), guess, jf.Tolerance(tolerance), correction)
                if float((jf.solve(block, z, solver, labels).x - exact).abs().max()) <= ERROR:
                    solvers[kind, size] = solver
                    break
    runs = {f"{kind} {size}": partial(jf.solve, block, z, solver, labels) for (kind, size), solver in solvers.items()}
    runs["sequential"] = partial(jf.solve, block, z, jf.Solver(jf.Sequential()), labels)
    seconds, answers = interleave(runs, REPEATS[batch])
    return [
        {
            "batch": batch, "solver": name, "seconds": seconds[name].median,
            "mean_sweeps": float(answer.sample_sweeps.float().mean()), "slowest": int(answer.sample_sweeps.max()),
            "error": float((answer.x - exact).abs().max()),
        }
        for name, answer in answers.items()
    ]  # fmt: skip


def counts(flow: jf.TarFlow, report: jf.Report, batch: int) -> list[dict[str, Any]]:
    """Calls and token evaluations to 1e-2: plain windows, and tuned ones, whole elsewhere than in the tough block."""
    z, labels = latents(flow, batch)
    exact = draw(flow, z, labels, "sequential").images
    blocks, length = _tuning(report).blocks, flow.config.num_tokens
    rows = []
    for size in (32, 64, length):
        for kind in ("plain", "tuned"):
            solvers = [
                jf.Solver(
                    jf.Window(size if i == TOUGH else length),
                    block.guess if kind == "tuned" else report.guess(i),
                    jf.Tolerance(1e-2),
                    block.correction if kind == "tuned" else jf.Plain(),
                )
                for i, block in enumerate(blocks)
            ]
            answer = draw(flow, z, labels, jf.Strategy(tuple(solvers)))
            calls = length * len(blocks)
            rows.append({"batch": batch, "kind": kind, "tough_window": size, **_answer(answer, exact),
                         "calls_of_sequential": calls / answer.network_calls,
                         "evaluations_per_token": answer.token_evaluations / (batch * calls)})  # fmt: skip
    return rows


def guided(flow: jf.TarFlow, batch: int) -> dict[str, Any]:
    """`auto` and the baselines under guidance."""
    z, labels = latents(flow, batch)
    plan = auto(flow, batch, guidance=GUIDANCE)
    runs = {
        "auto": partial(draw, flow, z, labels, plan, GUIDANCE),
        "auto, certified": partial(draw, flow, z, labels, plan, GUIDANCE, True),
        "jacobi": partial(draw, flow, z, labels, "jacobi", GUIDANCE),
        EAGER: partial(IN_PYTORCH.run, partial(draw, flow, z, labels, "sequential", GUIDANCE)),
    }
    found = compare(flow, z, labels, runs, guidance=GUIDANCE, repeats=REPEATS[batch]).to_json()
    return found | {"prediction": None if plan.prediction is None else asdict(plan.prediction)}


def profile(flow: jf.TarFlow, batch: int) -> dict[str, Any]:
    """Seconds by kind of operation, of one run each under PyTorch's profiler, which slows small operations down.

    The loops, whose hundreds of thousands of operations are all alike, invert one block only.
    """
    z, labels = latents(flow, batch)
    one = jf.TarFlow(replace(flow.config, num_blocks=1))
    one.blocks[0].load_state_dict(flow.blocks[0].state_dict())
    runs: dict[str, Callable[[], Any]] = {
        f"{GROWING_CACHE}, one block": partial(growing_cache_sample, one, z, labels, None),
        f"{EAGER}, one block": partial(IN_PYTORCH.run, partial(draw, one, z, labels, "sequential")),
        "jacobi": partial(draw, flow, z, labels, "jacobi"),
    }
    found: dict[str, Any] = {}
    for name, run in runs.items():
        run()
        started = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
            run()
            seconds = time.perf_counter() - started
        kinds = dict.fromkeys((*KINDS, "other operations"), 0.0)
        for event in profiler.key_averages():
            kind = next(
                (kind for kind, words in KINDS.items() if any(w in event.key for w in words)), "other operations"
            )
            kinds[kind] += event.self_cpu_time_total / 1e6
        found[name] = {"seconds": seconds, **kinds, "Python": max(seconds - sum(kinds.values()), 0.0)}
    rates = {}
    weight = torch.randn(4 * flow.config.channels, flow.config.channels)
    tokens = torch.randn(batch * flow.config.num_tokens, flow.config.channels)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = tokens.to(dtype), weight.to(dtype)
        timing, _ = interleave({"product": partial(torch.nn.functional.linear, a, b)}, 20)
        rates[str(dtype).removeprefix("torch.")] = 2 * len(a) * weight.numel() / timing["product"].median / 1e9
    return found | {"gigaflops_of_products": rates}


def compiled(flow: jf.TarFlow, batch: int) -> dict[str, Any]:
    """A sweep of all tokens of one block, as it is and compiled for these shapes."""
    z, labels = latents(flow, batch)
    block, length = flow.blocks[0], flow.config.num_tokens
    cache = block.init_cache(z, labels)
    found: dict[str, Any] = {}
    for name, kept in (("float32", cache), ("bfloat16", block.lower(cache))):
        torch._dynamo.reset()

        def sweep(kept: Any = kept) -> Tensor:
            return block.update(z, z, 0, length, kept)

        faster = torch.compile(sweep)
        with torch.inference_mode():
            started = time.perf_counter()
            faster()
            compiling = time.perf_counter() - started
            seconds, _ = interleave({"as it is": sweep, "compiled": faster}, 30)
        found[name] = {kind: timing.median for kind, timing in seconds.items()} | {"compiling": compiling}
    return found


def _tuning(report: jf.Report) -> jf.Tuning:
    if report.tuning is None:
        raise ValueError("the report has no tuning: make calibration")
    return report.tuning


def main() -> None:
    """Measure, writing after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "performance.json")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    flow = jf.TarFlow.from_pretrained(MODEL).requires_grad_(False)
    file = jf.find_report(flow)
    if file is None:
        raise ValueError(f"{MODEL} has no report: make calibration")
    report = jf.Report.load(file)
    every = settings(flow, report)
    parts: dict[str, Callable[[int], Any]] = {
        "grid": lambda batch: grid(flow, near(batch), batch),
        "final": lambda batch: final(flow, report, every, result["grid"][str(batch)], batch),
        "tough": lambda batch: tough(flow, report, batch),
        "counts": lambda batch: counts(flow, report, batch),
        "guided": lambda batch: guided(flow, batch),
        "profile": lambda batch: profile(flow, batch),
        "compiled": lambda batch: compiled(flow, batch),
    }

    def near(batch: int) -> Mapping[str, Mapping[str, Run]]:
        """The settings that are near at the batch size before, where that was measured, and the published one."""
        rows = result["grid"].get({16: "4", 64: "16"}.get(batch, ""))
        return every if rows is None else {name: promising(name, own, rows) for name, own in every.items()}

    head = {"command": "python benchmarks/performance.py", "model": MODEL, "machine": machine()}
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if result.get("machine") != head["machine"]:
        result = head | {part: {} for part in parts}
    for batch in arguments.batches:
        for part, measure in parts.items():
            wanted = batch in SMALL_BATCHES or part in ("grid", "final", "guided", "profile")
            if wanted and str(batch) not in result[part]:
                result[part][str(batch)] = measure(batch)
                result[part] = dict(sorted(result[part].items(), key=lambda entry: int(entry[0])))
                write_json(arguments.out, result)
                print(f"batch {batch}: {part} done", flush=True)


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
