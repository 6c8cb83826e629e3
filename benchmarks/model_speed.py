"""Times the bundled models, from the call to images that a user keeps: `python -m benchmarks.model_speed`, ten minutes.

Writes docs/results/model-speed.json, which fills README, docs/performance.md and the model cards. "To images" counts
denoising, for the original sampler and for `jf.sample` at its defaults; then come the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import jacobiflow as jf
from benchmarks.common import IN_PYTORCH, RESULTS, Json, complete, latents, parser, to_json, without_native
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.evaluation import paired_error
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.utils.timing import time_interleaved

BATCHES = {"fashion-p2": (1, 4, 16, 64), "emoji-p2": (1, 16), "digits-p1": (1, 16), "digits-maf": (1, 16)}
ROUNDS = {1: 7, 4: 5, 16: 3, 64: 3}
ORIGINAL_TO_IMAGES, AUTO_TO_IMAGES = "original sampler, to images", "auto, to images"
ORIGINAL, AUTO, EXACT, PAPER, DENOISING = "original sampler", "auto", "exact loop", "GS-Jacobi", "denoising"
DETAILED = "fashion-p2"  # The model that other samplers draw from, too.
TOLERANCE = 1e-3  # The tolerance of the paper's Algorithm 1.


def measure(key: Json) -> Json:
    """Seconds of a batch at the model's recommended settings, and largest errors against the exact loop in PyTorch."""
    plain, batch = jf.load(key["model"]), key["batch"]
    settings, (z, labels) = plain.recommended, latents(plain, batch)
    context = labels if plain.config.num_classes else None
    flow = plain.guided(settings.guidance)
    baseline, original = original_sampler(flow)
    draw = partial(jf.sample, flow, latents=z, labels=context, settings=None)

    def original_to_images() -> Tensor:
        images: Tensor = original(flow, z, context)
        return jf.denoise(plain, images, context, settings.denoise) if settings.denoise else images

    runs: dict[str, Callable[[], Any]] = {
        ORIGINAL_TO_IMAGES: original_to_images,
        AUTO_TO_IMAGES: partial(jf.sample, plain, latents=z, labels=context),
        ORIGINAL: partial(original, flow, z, context),
        AUTO: draw,
        IN_PYTORCH: without_native()(partial(draw, strategy="sequential")),
    }
    if key["model"] == DETAILED:
        path = jf.find_report(flow)
        assert path is not None
        report = jf.CalibrationReport.load(path)
        paper = jf.Strategy.parse(gs_jacobi_notation(report, TOLERANCE), report)
        runs |= {
            PAPER: without_native()(partial(draw, strategy=paper, certify=False)),
            EXACT: partial(draw, strategy="sequential"),
        }
    if settings.denoise:
        runs[DENOISING] = partial(jf.denoise, plain, draw().images, context, settings.denoise)
    timings, results = time_interleaved(runs, ROUNDS[batch])
    images = {name: x if isinstance(x, Tensor) else x.images for name, x in results.items()}
    references = {True: images[ORIGINAL_TO_IMAGES], False: images[IN_PYTORCH]}
    names = runs.keys() - {DENOISING, ORIGINAL_TO_IMAGES, IN_PYTORCH}
    errors = {name: paired_error(images[name], references[name == AUTO_TO_IMAGES]).max for name in sorted(names)}
    return {"original": baseline, "rounds": ROUNDS[batch], "seconds": to_json(timings), "max_error": errors}


def keys() -> list[Json]:
    return [{"model": model, "batch": batch} for model, batches in BATCHES.items() for batch in batches]


def main() -> None:
    parser(__doc__).parse_args()
    complete(RESULTS / "model-speed.json", keys(), measure)


if __name__ == "__main__":
    keep_freed_memory()
    main()
