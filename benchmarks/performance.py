"""Compares `auto` with original and other samplers on two idle cores: `python -m benchmarks.performance [FILE ...]`.

- `model-speed` (ten minutes; README, docs/performance.md and the model cards): the bundled models, from the call to
  images that a user keeps, for the original sampler and for `jf.sample` at its defaults; then the parts.
- `afhq-size` (ten minutes; docs/tarflow.md): one image by a flow of the size of AFHQ's, with random weights.
- `denoising` (a minute, one thread; docs/devices.md): `jf.denoise` in float32 and in bfloat16.
- `performance` (docs/performance.md): for each batch size of `fashion-p2`, a few settings of every sampler; then the
  fastest of each within 1e-3, interleaved with `auto` and the exact loop in PyTorch.
- `MODEL-strategies` (ten minutes; docs/paper.md): the strategies of the paper's Tables 3 and 4, proposals of the
  report, peers at their published settings, and `auto`, certified.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import MODELS
from benchmarks.lib.models import latents, random_flow, sample
from benchmarks.lib.peers import AUTOS, GRIDS, PEERS, gs_jacobi_grid
from benchmarks.lib.process import without_native
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import IN_PYTORCH, time_runs
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.comparison.compare import compare_samplers
from jacobiflow.evaluation import sample_errors
from jacobiflow.planner import Auto, auto
from jacobiflow.utils.timing import Timing, time_call

CPU = torch.device("cpu")
TOLERANCE = 1e-3  # of `auto`, of the paper's Algorithm 1, and of what counts as right
ROUNDS = {1: 7, 4: 5, 16: 3, 64: 3}

MODEL_BATCHES = {"fashion-p2": (1, 4, 16, 64), "emoji-p2": (1, 16), "digits-p1": (1, 16), "digits-maf": (1, 16)}
ORIGINAL_TO_IMAGES, AUTO_TO_IMAGES = "original sampler, to images", "auto, to images"
ORIGINAL, AUTO, EXACT, PAPER, DENOISING = "original sampler", "auto", "exact loop", "GS-Jacobi", "denoising"
DENOISED = {"fashion-p2": (1, 4, 16, 64)}
PRESET = jf.PRESETS["afhq"]
DETAILED = "fashion-p2"  # The model that other samplers draw from, too.

BATCHES = (1, 4, 16, 64)
OTHERS = (*GRIDS, "GS-Jacobi")
CERTIFIED = "auto, certified"
WITHOUT_LOOP = "auto, without the native loop"

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

    parts: list[float] = []  # the sampler's share of each call that also denoises

    def original_to_images() -> Tensor:
        seconds, images = time_call(original, CPU)
        parts.append(seconds)
        denoise(images)
        return images

    draw = partial(jf.sample, flow, latents=z, context=context, settings=None)
    exact = partial(draw, strategy="sequential")
    runs: dict[str, Callable[[], Any]] = {
        ORIGINAL_TO_IMAGES: original_to_images,
        IN_PYTORCH: without_native()(exact),
    }
    native_runs: dict[str, Callable[[], Any]] = {
        AUTO_TO_IMAGES: partial(jf.sample, plain, latents=z, context=context),
        AUTO: draw,
    }
    if key["model"] == DETAILED:
        paper = jf.Strategy.parse(gs_jacobi_notation(report, TOLERANCE), report)
        runs[PAPER] = without_native()(partial(draw, strategy=paper, certify=False))
        native_runs[EXACT] = exact
    if settings.denoise:
        native_runs[DENOISING] = partial(denoise, draw().images)
    seconds, results = time_runs(runs, ROUNDS[key["batch"]])
    native_seconds, native_results = time_runs(native_runs, ROUNDS[key["batch"]])
    timed = parts[1:]  # after the warm-up
    seconds |= native_seconds | {ORIGINAL: vars(Timing(statistics.median(timed), min(timed), max(timed)))}
    results |= native_results | {ORIGINAL: results[ORIGINAL_TO_IMAGES]}
    images = {name: getattr(results[name], "images", results[name]) for name in (ORIGINAL, AUTO, PAPER, EXACT)
              if name in results}  # fmt: skip
    errors = {name: sample_errors(each, results[IN_PYTORCH].images).max for name, each in images.items()}
    return {"seconds": seconds, "max_error": errors}


@torch.no_grad()
def measure_large(key: Json) -> Json:
    """Seconds of one guided image by the original sampler and by the exact loop, each once, at random weights.

    How long they take does not depend on the weights, unlike sweeps.
    """
    flow = random_flow(PRESET.config)
    (z, labels), guided = latents(flow, key["batch"]), flow.guided(PRESET.recommended.guidance)
    exact, images = time_call(partial(sample, guided, "sequential", z, labels), CPU)
    original, reference = time_call(partial(original_sampler(guided)[1], guided, z, labels), CPU)
    difference = float((images.images - reference).abs().max())
    return {"seconds": {EXACT: exact, ORIGINAL: original}, "max_difference": difference}


def measure_denoising(key: Json) -> Json:
    """Seconds of a denoising step for a batch, and by how much bfloat16 changes its images."""
    flow, _ = load(key["model"])
    z, labels = latents(flow, key["batch"])
    images = jf.sample(flow, latents=z, context=labels, settings=jf.SamplingSettings(flow.recommended.guidance)).images
    denoise = partial(jf.denoise, flow, images, labels)
    runs: dict[str, Callable[[], Tensor]] = {"float32": denoise, "bfloat16": partial(denoise, dtype="bfloat16")}
    seconds, results = time_runs(runs, ROUNDS[key["batch"]])
    change = (results["bfloat16"] - results["float32"]).abs()
    return {"seconds": seconds, "change": {"mean": float(change.mean()), "max": float(change.max())}}


def settings_of(name: str) -> Mapping[str, Sampler]:
    """Settings of a sampler for `DETAILED`, the published one first."""
    flow, report = load(DETAILED)
    if name == "GS-Jacobi":
        names = gs_jacobi_grid(report)
        return {text: partial(sample, flow, jf.Strategy.parse(text, report)) for text in names}
    return {
        ", ".join(f"{key} {value}" for key, value in setting.items()): partial(PEERS[name], flow, **setting)
        for setting in GRIDS[name]
    }


def fastest_setting(name: str, batch: int) -> str:
    """The fastest setting of a sampler within the tolerance, each timed once; the most accurate if none is within."""
    flow, _ = load(DETAILED)
    z, labels = latents(flow, batch)
    exact = sample(flow, "sequential", z, labels).images

    def rank(setting: str) -> tuple[bool, float]:
        run = partial(images, settings_of(name)[setting], z, labels)
        seconds, results = time_runs({name: run}, 1, warm_up=False)
        error = sample_errors(results[name], exact).max
        return (True, error) if error > TOLERANCE else (False, seconds[name]["min"])

    return min(settings_of(name), key=rank)


def images(run: Sampler, z: Tensor, context: Any) -> Tensor:
    return run(z, context).images


def measure_samplers(key: Json) -> Json:
    """One interleaved run of `auto`, of the exact loop in PyTorch, and of each sampler at its fastest setting."""
    batch, (flow, _) = key["batch"], load(DETAILED)
    z, labels = latents(flow, batch)
    runs: dict[str, Callable[[], Any]] = {
        CERTIFIED: partial(sample, flow, auto(flow, batch), z, labels, certify=True),
        IN_PYTORCH: without_native()(partial(sample, flow, "sequential", z, labels)),
    }
    for name in OTHERS:
        setting = fastest_setting(name, batch)
        runs[f"{name} | {setting}"] = partial(images, settings_of(name)[setting], z, labels)
    result: Json = compare_samplers(flow, z, labels, runs, repeats=ROUNDS[batch]).to_json()
    return {"rows": result["rows"], "encoding_pass": result["encoding_pass"]}


def measure_strategies(key: Json) -> Json:
    """A row per strategy: seconds, speed-up, network calls, and the error against the exact loop's images."""
    (flow, report), batch = load(key["model"]), key["batch"]
    z, labels = latents(flow, batch)
    draw = partial(sample, flow, z=z, context=labels)
    runs: dict[str, Callable[[], Any]] = {IN_PYTORCH: without_native()(partial(draw, strategy="sequential"))}
    if batch < LARGE:
        names = gs_jacobi_grid(report)
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
        "afhq-size": [([{"batch": 1}], measure_large)],
        "denoising": [(keys(DENOISED), measure_denoising)],
        "performance": [(keys({DETAILED: BATCHES}), measure_samplers)],
        **{f"{model}-strategies": [(keys({model: BATCHES}), measure_strategies)]
           for model in ("fashion-p2", "emoji-p2", "digits-p1")},
    }, one_thread=("denoising",))  # fmt: skip


if __name__ == "__main__":
    main()
