"""Times sbi from end to end, as it is and accelerated: `python -m benchmarks.sbi_flows`.

Writes docs/results/sbi.json, which fills docs/sbi.md, in 20 minutes on two cores that are otherwise idle. Estimators
are trained with sbi's defaults on 5,000 simulations of "simple likelihood, complex posterior" (Papamakarios et al.,
2019): five parameters, four points in the plane. A call is timed from its start to its samples.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from importlib.metadata import version
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from sbi.inference import NLE, NPE
from sbi.utils import BoxUniform
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser, temporary_folder, time_speed_up
from benchmarks.sources import ROOT
from jacobiflow.models.memory import keep_freed_memory

SIMULATIONS, EPOCHS, ROUNDS = 5_000, 100, 2
PRIOR = BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5))
OBSERVED = torch.tensor([0.7, -2.9, -1.0, -0.9, 0.6])  # parameters of the observation
TRAINERS = {"NPE": NPE, "NLE": NLE}


def simulate(theta: Tensor) -> Tensor:
    """Four points (B, 8) of a Gaussian in the plane: its mean, roots of its deviations, and its correlation by tanh."""
    mean, deviations, correlation = theta[:, None, :2], theta[:, None, 2:4].square(), theta[:, None, 4:].tanh()
    first, second = torch.randn(2, len(theta), 4, 1)
    second = correlation * first + (1 - correlation.square()).sqrt() * second
    return (mean + deviations * torch.cat([first, second], dim=-1)).flatten(1)


@cache
def observations() -> Tensor:
    """The observation, and 99 others whose parameters are of the prior."""
    torch.manual_seed(1)
    return simulate(torch.cat([OBSERVED[None], PRIOR.sample((99,))]))


def trained(method: str, kind: str) -> Any:
    """An estimator by sbi's own training, from `out/sbi` if it is there."""
    path = ROOT / "out" / "sbi" / f"{method}-{kind}.pt"
    if not path.exists():
        torch.manual_seed(0)
        theta = PRIOR.sample((SIMULATIONS,))
        trainer = TRAINERS[method](PRIOR, density_estimator=kind, show_progress_bars=False)
        estimator = trainer.append_simulations(theta, simulate(theta)).train(max_num_epochs=EPOCHS)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(estimator, path)
    return torch.load(path, weights_only=False)


def one_observation(posterior: Any, count: int) -> Tensor:
    return posterior.sample((count,), x=observations()[:1], show_progress_bars=False)


def all_observations(posterior: Any) -> Tensor:
    return posterior.sample_batched((100,), x=observations(), show_progress_bars=False)


class Call(NamedTuple):
    """A call of sbi: its method, and how the posterior is built."""

    method: str
    sample: Callable[[Any], Tensor]
    options: Json


SLICES = {"sample_with": "mcmc", "mcmc_parameters": {"warmup_steps": 25}}
CALLS = {
    "`sample((10_000,))`": Call("NPE", partial(one_observation, count=10_000), {}),
    "`sample_batched((100,))`, 100 observations": Call("NPE", all_observations, {}),
    "`slice_np_vectorized`, 200 samples": Call("NLE", partial(one_observation, count=200), SLICES),
}
ESTIMATORS = {"NPE": ("maf", "maf_rqs", "zuko_maf", "zuko_nsf"), "NLE": ("maf", "zuko_nsf")}


def seeded(sample: Callable[[Any], Tensor], posterior: Any) -> Tensor:
    """A call from the same random numbers each time."""
    torch.manual_seed(2)
    np.random.seed(2)
    return sample(posterior)


def share(run: Callable[[], Tensor], kind: type) -> float:
    """The share of a call's time that is spent in the methods of estimators of a kind."""
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = perf_counter()
            result = method(*arguments, **options)
            seconds.append(perf_counter() - started)
            return result

        return call

    with ExitStack() as stack:
        for name in ("sample", "log_prob", "sample_and_log_prob"):  # none of which calls another
            stack.enter_context(patch.object(kind, name, timed(getattr(kind, name))))
        started = perf_counter()
        run()
        return sum(seconds) / (perf_counter() - started)


def measure(key: Json) -> Json:
    """Seconds of a call, by sbi and accelerated, and the shares of the estimator."""
    call = CALLS[key["call"]]
    estimator = trained(call.method, key["estimator"])
    posterior = TRAINERS[call.method](PRIOR).build_posterior(estimator, **call.options)
    accelerated = copy.deepcopy(posterior)
    handle = jf.accelerate(accelerated)
    posteriors = {"library": posterior, "accelerated": accelerated}
    runs = {name: partial(seeded, call.sample, each) for name, each in posteriors.items()}
    metrics, _ = time_speed_up(runs, ROUNDS)
    shares = {name: share(run, type(estimator)) for name, run in runs.items()}
    return {**metrics, "share": shares, "backends": sorted(set(handle.backends.values()))}


def keys() -> Iterator[Json]:
    for name, call in CALLS.items():
        for kind in ESTIMATORS[call.method]:
            yield {"method": call.method, "estimator": kind, "call": name, "version": version("sbi")}


def main() -> None:
    parser(__doc__).parse_args()
    with temporary_folder(), warnings.catch_warnings():  # sbi logs its training where it runs
        warnings.simplefilter("ignore")
        complete(RESULTS / "sbi.json", keys(), measure)


if __name__ == "__main__":
    keep_freed_memory()
    main()
