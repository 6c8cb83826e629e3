"""`jf.accelerate` over features and rows, and in sbi's posteriors: `python benchmarks/drop_in_sizes.py`.

Writes docs/results/drop-in-sizes.json and docs/results/sbi.json, in about six minutes on two cores that are otherwise
idle. Ratios are to the library's own inverse in the same, interleaved run. Networks are not trained: weights are 1.5
times those of the initialisation, so that features depend on each other, and the context is one for all rows.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zuko
from sbi.inference import NPE
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.files import write_json
from jacobiflow.measuring import interleave, machine
from jacobiflow.memory import keep_freed_memory

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
TOLERANCE = 1e-3
CONTEXT, GAIN = 5, 1.5
KINDS = {"MAF": zuko.flows.MAF, "NSF": zuko.flows.NSF}
FEATURES, ROWS = (2, 5, 10, 20, 64), (1, 100, 10_000)
ESTIMATORS, SBI_FEATURES, SAMPLES = ("maf", "maf_rqs", "zuko_maf", "zuko_nsf"), (5, 10, 20), 10_000


def zuko_flow(kind: str, features: int) -> nn.Module:
    """Two transforms of two hidden layers of 50 units."""
    torch.manual_seed(0)
    flow = KINDS[kind](features, CONTEXT, transforms=2, hidden_features=(50, 50))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(GAIN)
    return flow.requires_grad_(False).eval()


def of_size(kind: str, features: int, rows: int) -> dict[str, Any]:
    """The library's inverse beside those to identical bits and to the tolerance."""
    flow = zuko_flow(kind, features)
    z, context = torch.randn(rows, features), torch.randn(CONTEXT)
    work = rows * features**2 * (10 if kind == "NSF" else 1)
    repeats = next(count for most, count in ((10**5, 30), (10**7, 7), (10**8, 3), (math.inf, 1)) if work <= most)
    return compared(flow, lambda each: each(context).transform.inv(z), repeats)


def compared(flow: Any, invert: Callable[[Any], Tensor], repeats: int) -> dict[str, Any]:
    """Seconds, ratios to the library, ways and differences of a flow and of two copies of it that are accelerated."""
    copies = {"identical bits": copy.deepcopy(flow), "tolerance": copy.deepcopy(flow)}
    done = {name: jf.accelerate(each, 0.0 if name != "tolerance" else TOLERANCE) for name, each in copies.items()}
    runs = {name: partial(invert, each) for name, each in {"library": flow, **copies}.items()}
    with torch.no_grad():
        seconds, answers = interleave(runs, repeats)
    exact = answers["library"]
    return {
        "seconds": {name: vars(timing) for name, timing in seconds.items()},
        "ratio": {name: seconds["library"].median / seconds[name].median for name in copies},
        "ways": {name: sorted(set(each.ways.values())) for name, each in done.items()},
        "passes": {name: sum(each.passes.values()) for name, each in done.items()},
        "identical": torch.equal(answers["identical bits"], exact),
        "max_error": float((answers["tolerance"] - exact).abs().max()),
    }


def posterior(estimator: str, features: int) -> Any:
    """One epoch of sbi's neural posterior estimation on a linear model, with a prior that has no bounds."""
    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(features), torch.eye(features))
    theta = prior.sample((500,))
    inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)
    inference.append_simulations(theta, theta + 0.3 * torch.randn(500, features)).train(max_num_epochs=1)
    return inference.build_posterior().set_default_x(torch.zeros(1, features))


def sampled(held: Any) -> Tensor:
    """10,000 samples of a posterior, the same each time."""
    torch.manual_seed(1)
    return held.sample((SAMPLES,), show_progress_bars=False)


def main() -> None:
    """Measure and write."""
    sizes, posteriors = [], []
    for kind in KINDS:
        for features in FEATURES:
            for rows in ROWS:
                sizes.append({"flow": kind, "features": features, "rows": rows, **of_size(kind, features, rows)})
                print(kind, features, rows, sizes[-1]["ratio"], sizes[-1]["ways"], file=sys.stderr)
    for estimator in ESTIMATORS:
        for features in SBI_FEATURES:
            row = compared(posterior(estimator, features), sampled, 5)
            posteriors.append({"estimator": estimator, "features": features, **row})
            print(estimator, features, row["ratio"], row["ways"], file=sys.stderr)
    about = {"command": "python benchmarks/drop_in_sizes.py", "machine": machine(), "tolerance": TOLERANCE}
    versions = {name: version(name) for name in ("zuko", "nflows", "sbi")}
    write_json(RESULTS / "drop-in-sizes.json", {**about, "versions": versions, "rows": sizes})
    write_json(RESULTS / "sbi.json", {**about, "versions": versions, "samples": SAMPLES, "rows": posteriors})


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # sbi logs its training where it runs
        main()
