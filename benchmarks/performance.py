"""Compares `auto` with the original sampler and other papers' samplers: `python -m benchmarks.performance`.

Writes docs/results/performance.json, which fills docs/performance.md and docs/peers.md, in half an hour on two cores
that are otherwise idle. For each batch size of `fashion-p2` it has the grid, every setting of every sampler, without
those that a smaller batch showed to be wrong or slow; the final, the fastest setting of each sampler within 1e-3 and
the published one, interleaved with `auto` and the exact loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

from torch import Tensor

import jacobiflow as jf
from benchmarks.common import IN_PYTORCH, MODELS, RESULTS, Json, latents, origin, parser, read, without_native
from benchmarks.peers import GRIDS, PEERS, gs_jacobi_grid
from jacobiflow.comparison.compare import compare_samplers
from jacobiflow.evaluation import paired_error
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.planner import auto
from jacobiflow.utils.files import write_json

MODEL = "fashion-p2"
BATCHES = (1, 4, 16, 64)
SMALLER = {16: "4", 64: "16"}  # the batch size whose grid tells which settings are promising
ROUNDS = {1: 9, 4: 7, 16: 5, 64: 3}
GRID_RUNS = {1: 2, 4: 2, 16: 1, 64: 1}  # Runs of each setting; the fastest counts.
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
ERROR = 1e-3
WRONG, SLOW = 1e-2, 1.3  # times the fastest setting within ERROR
CERTIFIED = "auto, certified"
WITHOUT_LOOP, WITHOUT_ALL = "auto, without the native loop", "auto, without all three"

Sampler = Callable[[Tensor, Tensor], Any]  # From latents and labels to images, network_calls and token_evaluations.


def sample(
    flow: jf.TarFlow, strategy: str | jf.Strategy, z: Tensor, labels: Tensor, certify: bool = False
) -> jf.Samples:
    return jf.sample(flow, latents=z, labels=labels, settings=None, strategy=strategy, certify=certify)


def images(run: Callable[..., Any], *arguments: Any) -> Tensor:
    return run(*arguments).images


def samplers_of(flow: jf.TarFlow, report: jf.CalibrationReport) -> dict[str, dict[str, Sampler]]:
    """Settings of every sampler by name, the published one first."""
    samplers: dict[str, dict[str, Sampler]] = {
        name: {
            ", ".join(f"{key} {value}" for key, value in setting.items()): partial(PEERS[name], flow, **setting)
            for setting in grid
        }
        for name, grid in GRIDS.items()
    }
    samplers["GS-Jacobi"] = {
        text: partial(sample, flow, jf.Strategy.parse(text, report)) for text in gs_jacobi_grid(report)
    }
    samplers["window"] = {}
    for size, tolerance in product((32, flow.config.num_tokens), TOLERANCES):
        solver = jf.Solver(jf.Window(size), stopping=jf.Tolerance(tolerance))
        strategy = jf.Strategy.uniform(solver, flow.config.num_blocks)
        samplers["window"][f"window:{size} to {tolerance:g}"] = partial(sample, flow, strategy)
    return samplers


def grid(flow: jf.TarFlow, samplers: Mapping[str, Mapping[str, Sampler]], batch: int) -> list[Json]:
    """A row for each setting, and for each tolerance of `auto`."""
    z, labels = latents(flow, batch)
    exact = sample(flow, "sequential", z, labels).images
    runs = {(name, setting): run for name, settings in samplers.items() for setting, run in settings.items()}
    for tolerance in TOLERANCES:
        runs["auto", f"to {tolerance:g}"] = partial(sample, flow, auto(flow, batch, tolerance))
    rows = []
    for (name, setting), run in runs.items():
        seconds = []
        for _ in range(GRID_RUNS[batch]):
            started = perf_counter()
            samples = run(z, labels)
            seconds.append(perf_counter() - started)
        rows.append({"sampler": name, "setting": setting, "seconds": min(seconds), **cost_and_error(samples, exact)})
        print(f"  {batch:3d} {name} {setting}: {min(seconds):.3f} s, error {rows[-1]['max_error']:.1e}", flush=True)
    return rows


def promising(name: str, settings: Mapping[str, Sampler], rows: list[Json]) -> dict[str, Sampler]:
    """The published setting of a sampler, and those that were neither wrong nor slow in `rows`, of a smaller batch."""
    limit = SLOW * min((row["seconds"] for row in rows_within(rows, name, ERROR)), default=math.inf)
    near = {row["setting"] for row in rows_within(rows, name, WRONG) if row["seconds"] <= limit}
    published = next(iter(settings))
    return {setting: run for setting, run in settings.items() if setting in near | {published}}


def rows_within(rows: list[Json], name: str, error: float) -> list[Json]:
    """The rows of a sampler whose largest error is at most `error`."""
    return [row for row in rows if row["sampler"] == name and row["max_error"] <= error]


def best(rows: list[Json], name: str) -> str:
    """The fastest setting of a sampler within the error; the most accurate if none is."""
    if near := rows_within(rows, name, ERROR):
        return str(min(near, key=lambda row: row["seconds"])["setting"])
    return str(min(rows_within(rows, name, math.inf), key=lambda row: row["max_error"])["setting"])


def plans_of(flow: jf.TarFlow, batch: int) -> dict[str, jf.Strategy]:
    """The plans of `auto`, with the report and without, and without what other samplers lack."""
    without_report = jf.TarFlow.from_pretrained(MODEL).requires_grad_(False)
    without_report.report_files = ()
    plan = auto(flow, batch)
    plans = {"auto": plan, CERTIFIED: plan, "auto, without a report": auto(without_report, batch)}
    with without_native():
        plans[WITHOUT_LOOP] = jf.plan(flow, batch_size=batch)
        plans[WITHOUT_ALL] = jf.plan(without_report, batch_size=batch, bf16=False)
    return plans


def final(flow: jf.TarFlow, samplers: Mapping[str, Mapping[str, Sampler]], rows: list[Json], batch: int) -> Json:
    """One interleaved run of the best and the published settings with `auto` and the exact loops."""
    z, labels = latents(flow, batch)
    plans = plans_of(flow, batch)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(sample, flow, plan, z, labels, certify=name == CERTIFIED) for name, plan in plans.items()
    }
    runs[IN_PYTORCH] = partial(sample, flow, "sequential", z, labels)
    runs |= {name: without_native()(runs[name]) for name in (WITHOUT_LOOP, WITHOUT_ALL, IN_PYTORCH)}
    others: dict[str, Sampler] = {}
    for name, settings in samplers.items():
        names = {best(rows, name)} | ({next(iter(settings))} if name != "window" else set())
        others |= {f"{name} | {setting}": settings[setting] for setting in sorted(names)}
    runs |= {name: partial(images, run, z, labels) for name, run in others.items()}
    result: Json = compare_samplers(flow, z, labels, runs, repeats=ROUNDS[batch]).to_json()
    exact = sample(flow, "sequential", z, labels).images
    for row in result["rows"]:
        name = row["strategy"]
        if name in plans:
            row["plan"] = blocks_by_piece(plans[name])
        if name in others:
            row |= cost_and_error(others[name](z, labels), exact)
    return result


def cost_and_error(samples: Any, exact: Tensor) -> Json:
    error = paired_error(samples.images, exact)
    cost = {"network_calls": samples.network_calls, "token_evaluations": samples.token_evaluations}
    return {"max_error": error.max, "mean_error": error.mean, **cost}


def blocks_by_piece(plan: jf.Strategy) -> dict[str, int]:
    """Blocks that the loop solves, and that sweeps solve; of these, with sweeps in bfloat16, and with fitted pieces."""
    by_sweeps = [solver for solver in plan.solvers if solver.partition != jf.Sequential()]
    return {
        "loop": len(plan.solvers) - len(by_sweeps),
        "swept": len(by_sweeps),
        "bfloat16": sum(solver.bf16_sweeps > 0 for solver in by_sweeps),
        "fitted": sum(solver.guess != jf.Latent() or solver.correction != jf.Plain() for solver in by_sweeps),
    }


def main() -> None:
    parser(__doc__).parse_args()
    flow = jf.TarFlow.from_pretrained(MODEL).requires_grad_(False)
    samplers = samplers_of(flow, jf.CalibrationReport.load(MODELS / MODEL / "report.json"))
    out = RESULTS / "performance.json"
    result: Json = {"model": MODEL, "grid": {}, "final": {}} | read(out, origin(grid))
    for batch in BATCHES:
        key = str(batch)
        smaller = result["grid"].get(SMALLER.get(batch))
        near = {name: promising(name, own, smaller) if smaller else own for name, own in samplers.items()}
        parts: dict[str, Callable[[], Any]] = {
            "grid": partial(grid, flow, near, batch),
            "final": lambda: final(flow, samplers, result["grid"][key], batch),  # noqa: B023
        }
        for part, measure in parts.items():
            if key not in result[part]:
                result[part][key] = measure()
                write_json(out, result)
                print(f"batch {batch}: {part} done", flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    main()
