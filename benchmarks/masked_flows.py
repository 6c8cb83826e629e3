"""Times masked flows of four libraries, as they are and accelerated: `python -m benchmarks.masked_flows [FILE ...]`.

Each FILE is a result file, measured on two idle cores. Flows have five transforms and random weights.
- `masked-flows` (docs/flows.md): sampling, without its random numbers, and the density, at one context of four features
  for all rows. The slow direction makes a pass of the network for each feature: sampling, or the density in some flows
  of normflows and pyro.
- `training` (a minute; docs/training.md): a training step, with a context of ten features for each row. The learning
  rate is so small that all steps do the same work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

import jacobiflow as jf
from benchmarks.lib.library_flows import FLOWS, PACKAGES, calls, training_step
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.timing import seconds_of, time_speed_up

CONTEXT = 4
HIDDEN = 50
WIDE, WIDE_HIDDEN, WIDE_ROWS = 784, 512, 64
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 1000, 1.0  # rounds, and the seconds that all of the library's may take
FEATURES = {"MAF": (2, 5, 10, 20, 64), "NSF": (2, 5, 10, 20)}  # of zuko's flows; all others have `FEW`
FEW = 5
BISECTED = {"SOSPF", "BPF", "NAF", "UNAF"}  # Flows that are inverted by bisection: 10,000 rows take minutes.
SLOW_DENSITY = {("normflows", "MAF"), ("pyro", "MAF"), ("pyro", "NSF"), ("pyro", "linear spline")}
ERROR_ROWS = 100  # the largest number of rows whose errors are measured

ROW_CONTEXT, TRAINED_ROWS = 10, 200
RATE = 1e-6  # the learning rate of a training step


def count_rounds(run: Callable[[], Any]) -> int:
    """The number of runs that take about `SECONDS` together."""
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / seconds_of(run))))


def measure_call(key: Json) -> Json:
    """Seconds of one direction, by the library and accelerated, and the root mean square errors of few rows."""
    library, kind, features, rows = (key[name] for name in ("library", "flow", "features", "rows"))
    slow, fast = ("density", "sampling") if (library, kind) in SLOW_DENSITY else ("sampling", "density")
    call = slow if key["direction"] == "slow" else fast
    torch.manual_seed(0)
    flow = FLOWS[library, kind](features, key["hidden"], CONTEXT).requires_grad_(False).eval()
    accelerated = copy.deepcopy(flow)
    handle = jf.accelerate(accelerated)
    torch.manual_seed(1)
    context, inputs = torch.randn(CONTEXT), torch.randn(rows, features)
    if key["direction"] == "slow":
        inputs = calls(flow, context, rows)["latents" if call == "sampling" else "sampling"](inputs)
    runs = {
        name: partial(calls(each, context, rows)[call], inputs)
        for name, each in (("library", flow), ("accelerated", accelerated))
    }
    with torch.no_grad():
        metrics, results = time_speed_up(runs, count_rounds(runs["library"]))
        if rows <= ERROR_ROWS:
            exact = calls(copy.deepcopy(flow).double(), context.double(), rows)[call](inputs.double())
            metrics["error"] = {name: float((each - exact).square().mean().sqrt()) for name, each in results.items()}
    return {"call": call, **metrics, "backends": sorted(set(handle.backends.values()))}


def call_keys() -> Iterator[Json]:
    """The sizes that the pages show; the wide flow comes last."""

    def key_of(library: str, kind: str, features: int, *others: Any) -> Json:
        names = ("library", "version", "flow", "features", "hidden", "rows", "direction")
        return dict(zip(names, (library, version(PACKAGES[library]), kind, features, *others), strict=True))

    for library, kind in FLOWS:
        for features in FEATURES.get(kind, (FEW,)) if library == "zuko" else (FEW,):
            yield key_of(library, kind, features, HIDDEN, 100, "slow")
            if kind not in BISECTED:
                yield key_of(library, kind, features, HIDDEN, 10_000, "slow")
            yield key_of(library, kind, features, HIDDEN, 10_000, "fast")
    yield key_of("zuko", "MAF", WIDE, WIDE_HIDDEN, WIDE_ROWS, "fast")


def measure_training(key: Json) -> Json:
    """Seconds of a training step by the library and accelerated."""
    torch.manual_seed(0)
    flow = FLOWS[key["library"], key["flow"]](key["features"], HIDDEN, ROW_CONTEXT)
    flows = {"library": flow, "accelerated": copy.deepcopy(flow)}
    jf.accelerate(flows["accelerated"])
    x, context = torch.randn(key["rows"], key["features"]), torch.randn(key["rows"], ROW_CONTEXT)
    runs = {
        name: partial(training_step, each, torch.optim.Adam(each.parameters(), RATE, fused=True), x, context)
        for name, each in flows.items()
    }
    runs["library"]()
    metrics, _ = time_speed_up(runs, count_rounds(runs["library"]))
    return metrics


def training_keys() -> Iterator[Json]:
    for kind in ("MAF", "NSF"):
        yield {"library": "zuko", "version": version("zuko"), "flow": kind, "features": FEW, "rows": TRAINED_ROWS}


def main() -> None:
    measure_files(__doc__, {
        "masked-flows": [(call_keys(), measure_call)],
        "training": [(training_keys(), measure_training)],
    }, one_thread=["training"])  # fmt: skip


if __name__ == "__main__":
    main()
