"""Compares `auto` with original and other samplers on two idle cores: `python -m benchmarks.performance [FILE ...]`.

- `model-speed` (ten minutes; README, docs/performance.md and the model cards): the bundled models, from the call to
  images that a user keeps, for the original sampler and for `jf.sample` at its defaults; then the parts.
- `denoising` (five minutes, one thread): `jf.denoise` in float32 and in bfloat16, beside one that passes the first
  image alone, to learn its memory, and then all others at once.
- `performance` (half an hour; docs/performance.md): for each batch size of `fashion-p2` the grid,
  every setting of every sampler, without those that a smaller batch showed to be wrong or slow; and the fastest setting
  of each sampler within 1e-3 and the published one, interleaved with `auto` and the exact loops.
- `MODEL-strategies` (ten minutes; docs/paper.md): the strategies of the paper's Tables 3 and 4, proposals of the
  report, peers at their published settings, and `auto`, certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import MODELS
from benchmarks.lib.models import latents, sample
from benchmarks.lib.peers import AUTOS, GRIDS, PEERS, gs_jacobi_grid
from benchmarks.lib.process import without_native
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import IN_PYTORCH, time_runs
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.comparison.compare import compare_samplers
from jacobiflow.evaluation import sample_errors
from jacobiflow.planner import Auto, auto
from jacobiflow.sampling.denoise import score

TOLERANCE = 1e-3  # of `auto`, of the paper's Algorithm 1, and of what counts as right
ROUNDS = {1: 7, 4: 5, 16: 3, 64: 3}

MODEL_BATCHES = {"fashion-p2": (1, 4, 16, 64), "emoji-p2": (1, 16), "digits-p1": (1, 16), "digits-maf": (1, 16)}
ORIGINAL_TO_IMAGES, AUTO_TO_IMAGES = "original sampler, to images", "auto, to images"
ORIGINAL, AUTO, EXACT, PAPER, DENOISING = "original sampler", "auto", "exact loop", "GS-Jacobi", "denoising"
DENOISED = {"fashion-p2": (1, 4, 16, 64), "emoji-p2": (1, 4, 16, 64)}
IN_ONE_PASS = "one pass"
DETAILED = "fashion-p2"  # The model that other samplers draw from, too.

BATCHES = (1, 4, 16, 64)
SMALLER = {16: 4, 64: 16}  # the batch size whose grid tells which settings are promising
GRID_RUNS = {1: 2, 4: 2, 16: 1, 64: 1}  # Runs of each setting; the fastest counts.
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
WRONG, SLOW = 1e-2, 1.3  # times the fastest setting within TOLERANCE
CERTIFIED = "auto, certified"
WITHOUT_LOOP, WITHOUT_ALL = "auto, without the native loop", "auto, without all three"

LARGE = 64  # The batch at which the strategies of the paper take too long.

Sampler = Callable[[Tensor, Any], Any]  # From latents and context to images and network_calls.


@cache
def load(model: str) -> tuple[Any, Any]:
    """A bundled model and its report."""
    flow, path = jf.load(model).requires_grad_(False), MODELS / model / "report.json"
    return flow, jf.CalibrationReport.load(path) if path.exists() else None


def measure_model(key: Json) -> Json:
    """Seconds of a batch at the model's recommended settings, and largest errors against the exact loop in PyTorch."""
    plain, report = load(key["model"])
    settings, (z, context) = plain.recommended, latents(plain, key["batch"])
    flow = plain.guided(settings.guidance)
    original = partial(original_sampler(flow)[1], flow, z, context)

    def denoise(images: Tensor) -> Tensor:
        return jf.denoise(plain, images, context, settings.denoise) if settings.denoise else images

    draw = partial(jf.sample, flow, latents=z, context=context, settings=None)
    exact = partial(draw, strategy="sequential")
    runs: dict[str, Callable[[], Any]] = {
        ORIGINAL_TO_IMAGES: lambda: denoise(original()),
        AUTO_TO_IMAGES: partial(jf.sample, plain, latents=z, context=context),
        ORIGINAL: original,
        AUTO: draw,
        IN_PYTORCH: without_native()(exact),
    }
    if key["model"] == DETAILED:
        paper = jf.Strategy.parse(gs_jacobi_notation(report, TOLERANCE), report)
        runs |= {PAPER: without_native()(partial(draw, strategy=paper, certify=False)), EXACT: exact}
    if settings.denoise:
        runs[DENOISING] = partial(denoise, draw().images)
    seconds, results = time_runs(runs, ROUNDS[key["batch"]])
    images = {name: getattr(results[name], "images", results[name]) for name in (ORIGINAL, AUTO, PAPER, EXACT)
              if name in results}  # fmt: skip
    errors = {name: sample_errors(each, results[IN_PYTORCH].images).max for name, each in images.items()}
    return {"seconds": seconds, "max_error": errors}


def measure_denoising(key: Json) -> Json:
    """Seconds of a denoising step for a batch, and by how much images differ from those of the first kind of pass."""
    flow, _ = load(key["model"])
    z, labels = latents(flow, key["batch"])
    images = jf.sample(flow, latents=z, context=labels, settings=jf.SamplingSettings(flow.recommended.guidance)).images

    def in_one_pass() -> Tensor:
        context, steps = flow.resolve_batch(images, labels), []
        for rows in filter(lambda rows: rows.start < len(images), (slice(0, 1), slice(1, None))):
            steps.append(score(flow, images[rows], context[rows], None))
        return images + flow.config.noise_std**2 * torch.cat(steps)

    runs: dict[str, Callable[[], Tensor]] = {
        IN_ONE_PASS: in_one_pass,
        "float32": partial(jf.denoise, flow, images, labels),
        "bfloat16": partial(jf.denoise, flow, images, labels, dtype="bfloat16"),
    }
    seconds, results = time_runs(runs, ROUNDS[key["batch"]])
    changes = {name: (results[name] - results[IN_ONE_PASS]).abs() for name in ("float32", "bfloat16")}
    return {"seconds": seconds,
            "change": {name: {"mean": float(change.mean()), "max": float(change.max())}
                       for name, change in changes.items()}}  # fmt: skip


@cache
def settings_of(name: str) -> Mapping[str, Sampler]:
    """Settings of a sampler for `DETAILED`, the published one first."""
    flow, report = load(DETAILED)
    if name in GRIDS:
        return {
            ", ".join(f"{key} {value}" for key, value in setting.items()): partial(PEERS[name], flow, **setting)
            for setting in GRIDS[name]
        }
    if name == "GS-Jacobi":
        return {text: partial(sample, flow, jf.Strategy.parse(text, report)) for text in gs_jacobi_grid(report)}
    plans = {
        f"window:{size} to {tolerance:g}": jf.Strategy.uniform(
            jf.Solver(jf.Window(size)), flow.config.num_blocks, tolerance
        )
        for size, tolerance in product((32, flow.config.num_tokens), TOLERANCES)
    }
    return {text: partial(sample, flow, plan) for text, plan in plans.items()}


OTHERS = (*GRIDS, "GS-Jacobi", "window")


@cache
def grid(batch: int) -> list[Json]:
    """A row for each promising setting, and for each tolerance of `auto`."""
    flow, _ = load(DETAILED)
    z, labels = latents(flow, batch)
    exact = sample(flow, "sequential", z, labels).images
    runs: dict[tuple[str, str], Sampler] = {}
    for name in OTHERS:
        names = promising(name, grid(SMALLER[batch])) if batch in SMALLER else settings_of(name)
        runs |= {(name, setting): settings_of(name)[setting] for setting in names}
    for tolerance in TOLERANCES:
        runs["auto", f"to {tolerance:g}"] = partial(sample, flow, auto(flow, batch, tolerance))
    rows = []
    for (name, setting), run in runs.items():
        timings, results = time_runs({name: partial(run, z, labels)}, GRID_RUNS[batch], warm_up=False)
        samples, seconds = results[name], timings[name]["min"]
        error, cost = sample_errors(samples.images, exact).max, getattr(samples, "outcome", samples)
        rows.append({"sampler": name, "setting": setting, "seconds": seconds, "max_error": error,
                     "network_calls": cost.network_calls})  # fmt: skip
        print(f"  {batch:3d} {name} {setting}: {seconds:.3f} s, error {error:.1e}", flush=True)
    return rows


def promising(name: str, rows: list[Json]) -> list[str]:
    """The published setting of a sampler, and those that were neither wrong nor slow in `rows`, of a smaller batch."""
    limit = SLOW * min((row["seconds"] for row in rows_within(rows, name, TOLERANCE)), default=math.inf)
    near = {row["setting"] for row in rows_within(rows, name, WRONG) if row["seconds"] <= limit}
    return [text for i, text in enumerate(settings_of(name)) if i == 0 or text in near]


def rows_within(rows: list[Json], name: str, error: float) -> list[Json]:
    """The rows of a sampler whose largest error is at most `error`."""
    return [row for row in rows if row["sampler"] == name and row["max_error"] <= error]


def best(rows: list[Json], name: str) -> str:
    """The fastest setting of a sampler within the tolerance; the most accurate if none is."""
    if near := rows_within(rows, name, TOLERANCE):
        return str(min(near, key=lambda row: row["seconds"])["setting"])
    return str(min(rows_within(rows, name, math.inf), key=lambda row: row["max_error"])["setting"])


def plans_of(flow: jf.TarFlow, batch: int) -> dict[str, jf.Strategy]:
    """The plans of `auto`, with the report and without, and without what other samplers lack."""
    without_report = jf.TarFlow.from_pretrained(DETAILED).requires_grad_(False)
    without_report.report_files = ()
    plan = auto(flow, batch)
    plans = {"auto": plan, CERTIFIED: plan, "auto, without a report": auto(without_report, batch)}
    with without_native():
        plans[WITHOUT_LOOP] = jf.plan(flow, batch_size=batch)
        plans[WITHOUT_ALL] = jf.plan(without_report, batch_size=batch, bf16=False)
    return plans


def images(run: Sampler, z: Tensor, context: Any) -> Tensor:
    return run(z, context).images


def measure_samplers(key: Json) -> Json:
    """The grid, and one interleaved run of the best and the published settings with `auto` and the exact loops."""
    batch = key["batch"]
    rows, (flow, _) = grid(batch), load(DETAILED)
    z, labels = latents(flow, batch)
    plans = plans_of(flow, batch)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(sample, flow, plan, z, labels, certify=name == CERTIFIED) for name, plan in plans.items()
    }
    runs[IN_PYTORCH] = partial(sample, flow, "sequential", z, labels)
    runs |= {name: without_native()(runs[name]) for name in (WITHOUT_LOOP, WITHOUT_ALL, IN_PYTORCH)}
    for name in OTHERS:
        published = next(iter(settings_of(name)))
        for setting in sorted({best(rows, name)} | ({published} if name != "window" else set())):
            runs[f"{name} | {setting}"] = partial(images, settings_of(name)[setting], z, labels)
    result: Json = compare_samplers(flow, z, labels, runs, repeats=ROUNDS[batch]).to_json()
    calls = {f"{row['sampler']} | {row['setting']}": row["network_calls"] for row in rows}
    for row in result["rows"]:
        name = row["strategy"]
        if name in plans:
            row["plan"] = blocks_by_piece(plans[name])
        row["network_calls"] = calls.get(name, row["network_calls"])
    return {"grid": rows, "rows": result["rows"], "encoding_pass": result["encoding_pass"]}


def blocks_by_piece(plan: jf.Strategy) -> dict[str, int]:
    """Blocks that the loop solves, and that sweeps solve; of these, with sweeps in bfloat16, and with fitted pieces."""
    by_sweeps = [solver for solver in plan.solvers if solver.partition != jf.Sequential()]
    return {
        "loop": len(plan.solvers) - len(by_sweeps),
        "swept": len(by_sweeps),
        "bfloat16": sum(isinstance(solver.guess, jf.Bf16Sweeps) for solver in by_sweeps),
        "fitted": sum(any(name in str(solver) for name in ("CausalLinear", "Chord")) for solver in by_sweeps),
    }


def measure_strategies(key: Json) -> Json:
    """A row per strategy: seconds, speed-up, network calls, and the error against the exact loop's images."""
    (flow, report), batch = load(key["model"]), key["batch"]
    z, labels = latents(flow, batch)
    draw = partial(sample, flow, z=z, context=labels)
    runs: dict[str, Callable[[], Any]] = {IN_PYTORCH: without_native()(partial(draw, strategy="sequential"))}
    if batch < LARGE:
        names = gs_jacobi_grid(report, short=True)
        for tolerance in (1e-1, 1e-2):
            names += [gs_jacobi_notation(report, tolerance, per_segment=each) for each in (False, True)]
        runs |= {name: partial(draw, strategy=jf.Strategy.parse(name, report)) for name in names}
        runs |= {name: partial(images, partial(peer, flow), z, labels) for name, peer in PEERS.items()}
    with without_native():
        plan = jf.plan(flow, batch_size=batch)
    runs[WITHOUT_LOOP] = without_native()(partial(draw, strategy=plan, certify=True))
    for name in AUTOS:
        runs[name] = partial(draw, strategy=auto(flow, batch, Auto.parse(name).tolerance), certify=True)
    return {"rows": compare_samplers(flow, z, labels, runs, repeats=ROUNDS[batch]).to_json()["rows"]}


def keys(batches: Mapping[str, tuple[int, ...]]) -> list[Json]:
    return [{"model": model, "batch": batch} for model in batches for batch in batches[model]]


def main() -> None:
    measure_files(__doc__, {
        "model-speed": [(keys(MODEL_BATCHES), measure_model)],
        "denoising": [(keys(DENOISED), measure_denoising)],
        "performance": [(keys({DETAILED: BATCHES}), measure_samplers)],
        **{f"{model}-strategies": [(keys({model: BATCHES}), measure_strategies)]
           for model in ("fashion-p2", "emoji-p2", "digits-p1")},
    }, one_thread=("denoising",))  # fmt: skip


if __name__ == "__main__":
    main()
