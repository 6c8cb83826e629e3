"""Measures README's table and chart: `python -m benchmarks.front_page`, a quarter of an hour on two idle cores.

A TarFlow at the settings that it recommends, by the original sampler, by the paper's method, by the exact loop and by
auto; and zuko's flows, as they are and accelerated. All on one machine, in one file, docs/results/front-page.json.
It goes on if it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import masked_flows
from benchmarks.common import IN_PYTORCH, RESULTS, Json, complete, latents, parser, to_json, without_native
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.comparison.baselines import GROWING_CACHE, original_sampler
from jacobiflow.evaluation import paired_error
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.utils.timing import time_interleaved

MODEL, BATCHES = "fashion-p2", (1, 4, 16, 64)
ROUNDS = {1: 7, 4: 5, 16: 3, 64: 3}
PAPER, EXACT, AUTO, DENOISING = "GS-Jacobi", "exact loop", "auto", "denoising"
TOLERANCE = 1e-3  # of the paper's Algorithm 1
KINDS, ROWS = ("MAF", "NSF"), (100, 10_000)


def tarflow(key: Json) -> Json:
    """Seconds of a batch of guided samples by each sampler, and errors against the exact loop in PyTorch."""
    plain, batch = jf.load(MODEL), key["batch"]
    flow, (z, labels) = plain.guided(plain.recommended.guidance), latents(plain, batch)
    assert isinstance(flow, jf.TarFlow)
    report = jf.find_report(flow)
    assert report is not None
    paper = gs_jacobi_notation(jf.CalibrationReport.load(report), TOLERANCE)
    plan = jf.plan(flow, batch_size=batch)
    draw = partial(jf.sample, flow, latents=z, labels=labels, settings=None)
    runs: dict[str, Callable[[], Any]] = {
        GROWING_CACHE: partial(original_sampler(flow)[1], flow, z, labels),
        PAPER: without_native()(
            partial(draw, strategy=jf.Strategy.parse(paper, jf.CalibrationReport.load(report)), certify=False)
        ),
        IN_PYTORCH: without_native()(partial(draw, strategy="sequential")),
        EXACT: partial(draw, strategy="sequential"),
        AUTO: partial(draw, strategy=plan),
    }
    timings, results = time_interleaved(runs, ROUNDS[batch])
    images = {name: x if isinstance(x, Tensor) else x.images for name, x in results.items()}
    denoising, _ = time_interleaved({DENOISING: partial(jf.denoise, plain, images[AUTO], labels)}, 1)
    errors = {name: paired_error(x, images[IN_PYTORCH]).max for name, x in images.items()}
    return {"seconds": to_json(timings | denoising), "errors": errors, "paper": paper}


def keys() -> list[Json]:
    found: list[Json] = [{"batch": batch} for batch in BATCHES]
    for kind in KINDS:
        for features in masked_flows.FEATURES[kind]:
            for rows in ROWS:
                found.append({
                    "library": "zuko", "flow": kind, "features": features, "hidden": masked_flows.HIDDEN, "rows": rows,
                    "direction": "slow",
                })  # fmt: skip
    return found


def measure(key: Json) -> Json:
    return tarflow(key) if "batch" in key else masked_flows.measure(key)


if __name__ == "__main__":
    parser(__doc__).parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    complete(RESULTS / "front-page.json", keys(), measure)
