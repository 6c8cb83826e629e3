"""Measures memory and rounding on two idle cores: `python -m benchmarks.devices [FILE ...]`.

- `precision` (docs/devices.md): samples of trained models by the exact loop that reads their weights in 16 bits and by
  the one that reads them in float32; two layers of STARFlow's released shape, with random weights; and float64.
- `large-models` (five minutes, 4 GiB; docs/devices.md): the peak memory while a STARFlow of the released width is
  loaded, and while it is sampled as a whole and by one block at a time. Its few layers have random weights.
- `rounding` (ten minutes; docs/exactness.md): residuals, sensitivities and errors beside float64 of samples that
  float32 solved token by token, under the recommended guidance; and the time of a call with sensitivity over one
  without.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

import jacobiflow as jf
from benchmarks import ROOT
from benchmarks.lib.models import latents, random_starflow, sample
from benchmarks.lib.process import in_new_process, memory, reset_peak_memory
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import seconds_of, time_runs
from examples.captions import GUIDANCE, PROMPTS
from jacobiflow import native
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.models import Flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.models.memory import memory_needs
from jacobiflow.sampling.result import SENSITIVITY_BOUND, Samples
from jacobiflow.sampling.sensitivity import FLOAT64_BOUND
from jacobiflow.utils.files import sha256

MODELS = ("emoji-p2", "emoji-p2, bfloat16", "emoji-star", "fashion-p2")
RELEASED = jf.STARFlowConfig(layers_per_block=(2,))  # One block of two layers that reads the text.
FLOAT64_MODEL, FLOAT64_BATCH = "emoji-p2", 16  # what is sampled in float64, too
BATCHES = (1, 4, 16, 64)
ROUNDS = {1: 9, 4: 7, 16: 5, 64: 3}
FLOAT32, HALVES, AUTO, ORIGINAL = "float32", "16 bits", "auto", "original"

LARGE = jf.STARFlowConfig(layers_per_block=(1, 1, 4))
INTERVAL = 0.002  # Seconds between two looks at the memory.

ROUNDED_MODELS = ("digits-p1", "alanine-dipeptide", "fashion-p2", "emoji-star", "emoji-p2")
ROUNDED, ROUNDED_BATCH, FACTOR = 128, 16, 4  # Samples, samples in a batch, and a factor between sensitivity and error.


def trained(name: str) -> Flow:
    """A trained model, bundled or of the examples: with the weights that it is stored with, or rounded to bfloat16."""
    name, _, weights = name.partition(", ")
    path = ROOT / "examples" / name
    flow = jf.load(path if path.exists() else name)
    if weights == "bfloat16":
        for parameter in flow.parameters():
            parameter.copy_(parameter.bfloat16())
    return flow


@contextmanager
def in_float32() -> Iterator[None]:
    """Exact loops read all weights in float32; also decorates a function."""
    with patch.object(native.load_library(), "has_fast_halves", False):
        yield


@torch.no_grad()
def time_model(key: Json) -> Json:
    """Seconds of a batch of unguided samples (of emoji-star guided ones), and the error of 16 bits.

    One sample is drawn by `auto` and by the original sampler, too.
    """
    flow, batch = trained(key["model"]), key["batch"]
    flow = flow.guided(GUIDANCE if isinstance(flow, jf.STARFlow) else None)
    z, context = latents(flow, batch, prompts=PROMPTS)
    draw = partial(sample, flow, z=z, context=context, certify=True)
    runs: dict[str, Callable[[], Any]] = {
        FLOAT32: in_float32()(partial(draw, "sequential")),
        HALVES: partial(draw, "sequential"),
    }
    if batch == 1:
        values = flow.context_kind.resolve(context, batch).values
        runs |= {AUTO: partial(draw, jf.plan(flow)), ORIGINAL: partial(original_sampler(flow)[1], flow, z, values)}
    seconds, results = time_runs(runs, ROUNDS[batch])
    return {"seconds": seconds, "error": float((results[HALVES].x - results[FLOAT32].x).abs().max())}


def released_block(key: Json) -> Json:
    """Seconds of the exact loop of a block of the released shape."""
    native.load_library()
    block = random_starflow(RELEASED, key["released"]).blocks[0]
    z = draw_latents(1, RELEASED.num_tokens, RELEASED.token_dim, seed=1)
    return {"seconds": seconds_of(partial(jf.solve, block, z, jf.Solver(jf.Sequential())))}


def time_double(key: Json) -> Json:
    """Seconds of a batch of samples of `FLOAT64_MODEL` in float64 and in float32."""
    flow = jf.load(FLOAT64_MODEL)
    z, labels = latents(flow, key["double"])
    flows = {"float32": flow, "float64": deepcopy(flow).double()}
    seconds, _ = time_runs({name: partial(sample, each, "sequential", z, labels) for name, each in flows.items()}, 3)
    return {"seconds": seconds}


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the largest increase of this process's own memory, without pages of files."""
    before, peak, is_over = memory("RssAnon"), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not is_over.wait(INTERVAL):
            peak = max(peak, memory("RssAnon") - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: peak
    finally:
        is_over.set()
        thread.join()


def load_large(folder: str, dtype: str) -> Json:
    """Peak memory of loading, in units of the weights: of the process's own, and with the pages of mapped files."""
    jf.load("digits-p1")  # What a first load sets up is not of this model.
    before = memory("VmRSS")
    reset_peak_memory()
    with peak_memory() as peak:
        flow = jf.load(folder, dtype=dtype)
    weights = sum(tensor.nbytes for tensor in flow.state_dict().values())
    with_files = memory("VmHWM") - before
    return {"weights": weights, "peak": peak() / weights, "peak_with_files": with_files / weights}


def sample_large(folder: str, how: str) -> Json:
    """Peak memory of one sample by the exact loop, the loading included."""
    native.load_library()
    jf.sample(jf.load("digits-p1"), 1, labels=[0], strategy="sequential")
    with peak_memory() as peak:
        flow: Any = jf.load(folder, dtype="bfloat16", offload=how == "offloaded")
        z = draw_latents(1, flow.config.num_tokens, flow.config.token_dim, seed=1)
        states = draw_latents(1, flow.config.text_tokens, flow.config.text_dim, seed=2)
        x = jf.sample(flow, latents=z, context=states, strategy="sequential", settings=None).x
    needs = memory_needs(flow, torch.device("cpu"), torch.bfloat16)
    return {
        "weights": needs.weights, "largest_block": needs.largest_block, "sample_bytes": needs.sample,
        "peak": peak(), "samples": sha256(x.numpy().tobytes()),
    }  # fmt: skip


def measure_large(key: Json) -> Json:
    """Measures in a process of its own."""
    run, how = (load_large, key["load"]) if "load" in key else (sample_large, key["sample"])
    with TemporaryDirectory() as folder:
        random_starflow(LARGE, "bfloat16").save_pretrained(folder)
        return in_new_process(run, folder, how)


def measure_rounding(key: Json) -> Json:
    """Residuals, sensitivities and errors of many samples, and the relative time of sensitivities."""
    flow = trained(key["model"]).requires_grad_(False)
    settings = jf.SamplingSettings(None if flow.recommended is None else flow.recommended.guidance)

    def draw(flow: Flow, num: int, **options: Any) -> Samples:
        z, context = latents(flow, num, prompts=PROMPTS)
        return jf.sample(
            flow, latents=z.to(flow.var.dtype), context=context, settings=settings, strategy="sequential",
            batch_size=ROUNDED_BATCH, **options,
        )  # fmt: skip

    out = draw(flow, ROUNDED, certify="always", sensitivity=True)
    assert out.residual is not None and out.sensitivity is not None
    error = (out.x - draw(deepcopy(flow).double(), ROUNDED).x).abs().flatten(1).amax(dim=1)
    columns = {"residual": out.residual, "sensitivity": out.sensitivity, "error": error}
    ratio = out.sensitivity / error
    is_above, is_named = error > SENSITIVITY_BOUND, out.sensitivity > SENSITIVITY_BOUND

    def relative_time(num: int) -> float:
        runs = {str(each): partial(draw, flow, num, sensitivity=each) for each in (False, True)}
        seconds, _ = time_runs(runs, 5)
        return seconds["True"]["median"] / seconds["False"]["median"]

    return {
        "samples": ROUNDED,
        **{name: {"median": float(column.median()), "max": float(column.max())} for name, column in columns.items()},
        "within_factor": float(((ratio >= 1 / FACTOR) & (ratio <= FACTOR)).double().mean()),
        "above": int(is_above.sum()), "above_and_named": int((is_above & is_named).sum()), "named": int(is_named.sum()),
        "in_float64": int((out.sensitivity > FLOAT64_BOUND).sum()),
        "time": {str(num): relative_time(num) for num in (1, ROUNDED_BATCH)},
    }  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore", ".* amplify")
    measure_files(__doc__, {
        "precision": [
            ([{"model": model, "batch": batch} for model in MODELS for batch in BATCHES], time_model),
            ([{"released": dtype} for dtype in ("bfloat16", "float32")],
             lambda key: in_new_process(released_block, key)),
            ([{"double": FLOAT64_BATCH}], time_double),
        ],
        "large-models": [([{"load": "bfloat16"}, {"load": "float32"}, {"sample": "offloaded"}, {"sample": "whole"}],
                          measure_large)],
        "rounding": [([{"model": model} for model in ROUNDED_MODELS], measure_rounding)],
    })  # fmt: skip


if __name__ == "__main__":
    main()
