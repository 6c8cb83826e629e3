"""Measures what float32 rounding does to samples: `python -m benchmarks.rounding`, ten minutes on two idle cores.

For each model residuals, sensitivities, and errors beside float64, of samples that float32 solved token by token, under
the recommended guidance; and the time of a call with sensitivity over one without. Writes docs/results/rounding.json,
which fills docs/exactness.md.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, latents, parser
from benchmarks.sources import ROOT
from examples.captions import load
from jacobiflow.models.flow import Flow
from jacobiflow.sampling.result import SENSITIVITY_BOUND, Samples
from jacobiflow.sampling.sensitivity import FLOAT64_BOUND
from jacobiflow.utils.timing import time_interleaved

BATCH, BATCHES, FACTOR, ROUNDS = 16, 8, 4, 5
PROMPTS = ("blue heart", "large green circle", "hand dark skin", "hand light skin", "banana", "sunglasses", "cat")
MODELS: dict[str, Callable[[], Flow]] = {
    "digits-p1": partial(jf.load, "digits-p1"),
    "alanine-dipeptide": partial(jf.load, ROOT / "examples" / "alanine-dipeptide"),
    "fashion-p2": partial(jf.load, "fashion-p2"),
    "emoji-star": load,
    "emoji-p2": partial(jf.load, "emoji-p2"),
}


def draw(flow: Flow, batch: int, seed: int, **changed: Any) -> Samples:
    """Draws samples token by token under the recommended guidance, without denoising."""
    z, labels = latents(flow, batch, seed)
    context: Any = [PROMPTS[i % len(PROMPTS)] for i in range(batch)] if flow.reads_text else labels
    if not flow.has_conditions:
        context = None
    settings = jf.SamplingSettings(None if flow.recommended is None else flow.recommended.guidance)
    return jf.sample(flow, latents=z, context=context, settings=settings, strategy="sequential", **changed)


def measure(key: Json) -> Json:
    flow = MODELS[key["model"]]().requires_grad_(False)
    wide = copy.deepcopy(flow).double()
    residual, sensitivity, error = [], [], []
    for seed in range(BATCHES):
        out = draw(flow, BATCH, seed, certify="always", sensitivity=True)
        assert out.residual is not None and out.sensitivity is not None
        residual.append(out.residual)
        sensitivity.append(out.sensitivity)
        error.append((out.x - draw(wide, BATCH, seed).x).abs().flatten(1).amax(dim=1))
    values = {"residual": residual, "sensitivity": sensitivity, "error": error}
    columns = {name: torch.cat(parts).double() for name, parts in values.items()}
    ratio = columns["sensitivity"] / columns["error"]
    is_above, is_named = (columns[name] > SENSITIVITY_BOUND for name in ("error", "sensitivity"))
    return {
        "samples": len(ratio),
        **{name: {"median": float(column.median()), "max": float(column.max())} for name, column in columns.items()},
        "ratio": float(ratio.median()),
        "within_factor": float(((ratio >= 1 / FACTOR) & (ratio <= FACTOR)).double().mean()),
        "above": int(is_above.sum()), "above_and_named": int((is_above & is_named).sum()), "named": int(is_named.sum()),
        "in_float64": int((columns["sensitivity"] > FLOAT64_BOUND).sum()),
        "time": {str(batch): times(flow, batch) for batch in (1, BATCH)},
    }  # fmt: skip


def times(flow: Flow, batch: int) -> float:
    """The time of a call with sensitivity over that of one without."""
    runs = {name: partial(draw, flow, batch, 1, sensitivity=name == "measured") for name in ("plain", "measured")}
    timings, _ = time_interleaved(runs, ROUNDS)
    return timings["measured"].median / timings["plain"].median


def main() -> None:
    parser(__doc__).parse_args()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* amplify")
        complete(RESULTS / "rounding.json", [{"model": model} for model in MODELS], measure)


if __name__ == "__main__":
    main()
