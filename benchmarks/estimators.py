"""Times every flow that sbi builds, and the flows of nessai: `python -m benchmarks.estimators [FILE ...]`.

Each FILE is a result file, in processor time of one thread:
- `estimators` (docs/sbi.md and docs/flows.md): samples at one context, densities and a training step.
- `coupling-widths` (docs/flows.md): a training step of sbi's "nsf" for several widths of its networks. Here native
  code computes gradients at all widths, where `accelerate` leaves those of wide networks to the library.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from glasflow import flows as glasflow
from sbi.neural_nets import posterior_nn
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.lib.results import Json, measure_files

FEATURES, CONTEXT = 5, 10
MASKED, COUPLING = ("maf", "maf_rqs", "zuko_maf", "zuko_nsf", "zuko_ncsf"), ("nsf", "zuko_nice")
MONOTONE, OTHERS = ("zuko_bpf", "zuko_sospf", "zuko_naf", "zuko_unaf"), ("made", "mdn", "zuko_gf")
BISECTED = ("zuko_naf", "zuko_unaf")  # by whom 10,000 samples take minutes
SAMPLE, LOG_PROB, STEP = "sample", "log_prob", "training step"
CALLS = ((SAMPLE, 1), (SAMPLE, 10_000), (LOG_PROB, 100), (STEP, 200))
WIDTHS = (256, 384, 512)
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 300, 1.5  # rounds, and the seconds that all of the library's may take
RATE, CLIP, NOISE = 1e-6, 5.0, 0.05

GLASFLOW: dict[str, Callable[..., nn.Module]] = {  # as nessai makes them by default
    "MAF": partial(glasflow.MaskedAffineAutoregressiveFlow, n_transforms=4, n_blocks_per_transform=2, n_neurons=20),
    "RealNVP": partial(glasflow.RealNVP, n_transforms=4, n_blocks_per_transform=2, n_neurons=20, linear_transform="lu"),
    "CouplingNSF": partial(glasflow.CouplingNSF, n_transforms=4, n_blocks_per_transform=2, n_neurons=20,
                           linear_transform="lu"),
}  # fmt: skip


class SbiFlow:
    """An estimator of sbi with random weights."""

    def __init__(self, key: Json) -> None:
        torch.manual_seed(0)
        rows = torch.randn(1_000, FEATURES), torch.randn(1_000, CONTEXT)
        options = {"hidden_features": key["hidden"]} if "hidden" in key else {}
        self.flow: Any = posterior_nn(key["flow"], **options)(*rows)

    def sample(self, flow: Any, context: Tensor, rows: int) -> Tensor:
        return flow.sample(torch.Size((rows,)), context[:1])

    def log_prob(self, flow: Any, x: Tensor, context: Tensor) -> Tensor:
        return flow.log_prob(x.unsqueeze(0), context).squeeze(0)


class GlasflowFlow:
    """A flow of glasflow with random weights, without a context."""

    def __init__(self, key: Json) -> None:
        torch.manual_seed(0)
        self.flow: Any = GLASFLOW[key["flow"]](n_inputs=FEATURES)

    def sample(self, flow: Any, context: Tensor, rows: int) -> Tensor:
        return flow.sample(rows)

    def log_prob(self, flow: Any, x: Tensor, context: Tensor) -> Tensor:
        return flow.log_prob(x)


def make_run(key: Json, made: SbiFlow | GlasflowFlow, flow: Any) -> Callable[[], Any]:
    """The call of a key, from the same numbers each time."""
    torch.manual_seed(1)
    x, context = torch.randn(key["rows"], FEATURES), torch.randn(key["rows"], CONTEXT)
    optimizer = torch.optim.Adam(flow.parameters(), RATE)

    def step() -> None:
        optimizer.zero_grad()
        (-made.log_prob(flow, x, context).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        optimizer.step()

    @torch.no_grad()
    def sample() -> Tensor:
        torch.manual_seed(2)
        return made.sample(flow, context, key["rows"])

    density = torch.no_grad()(partial(made.log_prob, flow, x, context))
    runs: dict[str, Callable[[], Any]] = {SAMPLE: sample, LOG_PROB: density, STEP: step}
    return runs[key["call"]]


def measure(key: Json) -> Json:
    """Seconds of a call by the library and accelerated, in turn."""
    made = (SbiFlow if key["library"] == "sbi" else GlasflowFlow)(key)
    with torch.no_grad():
        for parameter in made.flow.parameters():
            parameter += NOISE * torch.randn_like(parameter)
    flow = made.flow.eval()
    accelerated = copy.deepcopy(flow)
    handle = jf.accelerate(accelerated)
    runs = {name: make_run(key, made, each) for name, each in (("library", flow), ("accelerated", accelerated))}
    with patch("jacobiflow.native.chain._MAX_TRAINED_WEIGHT", 2**40 if "hidden" in key else 2**17):
        results = {name: run() for name, run in runs.items()}
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / processor_time(runs["library"]))))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _, (name, run) in product(range(rounds), runs.items()):
            times[name].append(processor_time(run))
    seconds = {name: median(each) for name, each in times.items()}
    metrics: Json = {
        "rounds": rounds, "seconds": seconds, "speed_up": seconds["library"] / seconds["accelerated"],
        "backends": sorted(set(handle.backends.values())),
    }  # fmt: skip
    if key["call"] != STEP:
        difference = (results["accelerated"] - results["library"]).abs().max()
        metrics["difference"] = float(difference / results["library"].abs().max())
    return metrics


def processor_time(run: Callable[[], Any]) -> float:
    started = process_time()
    run()
    return process_time() - started


def estimator_keys() -> Iterator[Json]:
    for name, (call, rows) in product((*MASKED, *COUPLING, *MONOTONE, *OTHERS), CALLS):
        if name not in BISECTED or call != SAMPLE or rows == 1:
            yield {"library": "sbi", "version": version("sbi"), "flow": name, "call": call, "rows": rows}
    for name, (call, rows) in product(GLASFLOW, CALLS):
        yield {"library": "glasflow", "version": version("glasflow"), "flow": name, "call": call, "rows": rows}


def width_keys() -> Iterator[Json]:
    for hidden in WIDTHS:
        names = {"library": "sbi", "version": version("sbi"), "flow": "nsf"}
        yield names | {"hidden": hidden, "call": STEP, "rows": 200}


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    files = {"estimators": [(estimator_keys(), measure)], "coupling-widths": [(width_keys(), measure)]}
    measure_files(__doc__, files, one_thread=[*files])


if __name__ == "__main__":
    main()
