"""Times what users of other packages wait for, as it is and accelerated: `python -m benchmarks.packages [FILE ...]`.

Each FILE is a result file: `sbi`, calls of sbi (20 minutes on two idle cores; docs/sbi.md); `clients`, a call of each
package that builds on masked flows (three minutes; docs/training.md); and `fits`, a training with its samples (a
quarter of an hour, in processor time of one thread; docs/training.md). All posteriors are those of one simulator. Each
package makes its own object by its public interface. Beside those of the extra `dev`, two packages must be installed:
`pip install pocomc causalflows`.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from time import process_time
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import sbi
import torch
import zuko
from sbi.inference import NLE, NPE
from scipy.stats import uniform
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import jacobiflow as jf
from benchmarks.lib.library_flows import TRANSFORMS, training_step
from benchmarks.lib.results import Json, measure_files
from benchmarks.lib.simulator import DATA, PARAMETERS, PRIOR, observations, simulations, standardized
from benchmarks.lib.timing import time_speed_up

TRAINERS = {"NPE": NPE, "NLE": NLE}
SAMPLES = 10_000

# Calls of sbi on estimators that are trained until they converge, for at most `EPOCHS`.
SIMULATIONS, EPOCHS = 5_000, 100
ROUNDS = {"NPE": 20, "NLE": 5}
ESTIMATORS = ("maf", "zuko_nsf")

# Calls of each package.
FEATURES = 10  # of flows with random weights
FEW_SIMULATIONS, FEW_EPOCHS = 2_000, 10

# Fits.
FIT_SIMULATIONS, FIT_EPOCHS, BATCH = 10_000, 10, 200
HIDDEN, RATE = (50, 50), 5e-4  # These are sbi's own.
LOADER, BY_INDEX = "DataLoader, Adam", "batches by index, Adam(fused=True)"
DIMENSIONS = 6  # The number of parameters of pocomc's density.
FIT_ROUNDS = {"zuko": 2, "sbi NPE": 2, "pocomc": 1}


def train_sbi(method: str, kind: str, count: int, **options: Any) -> tuple[Any, Any]:
    """The trainer of sbi and its trained estimator."""
    trainer = TRAINERS[method](PRIOR, density_estimator=kind, show_progress_bars=False)
    return trainer, trainer.append_simulations(*simulations(count)).train(**options)


def seeded(run: Callable[[Any], Any], target: Any) -> Any:
    """Makes a call from the same random numbers each time."""
    torch.manual_seed(1)
    np.random.seed(1)
    return run(target)


def both_ways(run: Callable[[Any], Any], target: Any) -> dict[str, Callable[[], Any]]:
    """A call on an object as it is and on an accelerated copy, or on a library whose new flows are accelerated."""
    is_library = isinstance(target, ModuleType)
    fast = target if is_library else copy.deepcopy(target)
    if not is_library:
        jf.accelerate(fast)

    def accelerated() -> Any:
        with jf.accelerate(fast) if is_library else nullcontext():
            return seeded(run, fast)

    return {"library": partial(seeded, run, target), "accelerated": accelerated}


# Calls of sbi


def one_observation(posterior: Any, count: int) -> Tensor:
    return posterior.sample((count,), x=observations()[:1], show_progress_bars=False)


def all_observations(posterior: Any) -> Tensor:
    return posterior.sample_batched((100,), x=observations(), show_progress_bars=False)


class SbiCall(NamedTuple):
    """A call of sbi: its method, and how the posterior is built."""

    method: str
    sample: Callable[[Any], Tensor]
    options: Json


SLICES = {"sample_with": "mcmc", "mcmc_parameters": {"warmup_steps": 25}}
SBI_CALLS = {
    "`sample((10_000,))`": SbiCall("NPE", partial(one_observation, count=SAMPLES), {}),
    "`sample_batched((100,))`, 100 observations": SbiCall("NPE", all_observations, {}),
    "`slice_np_vectorized`, 200 samples": SbiCall("NLE", partial(one_observation, count=200), SLICES),
}


@cache
def trained(method: str, kind: str) -> Any:
    """An estimator by sbi's own training."""
    torch.manual_seed(0)
    return train_sbi(method, kind, SIMULATIONS, max_num_epochs=EPOCHS)[1]


def measure_sbi(key: Json) -> Json:
    """Seconds of a call, by sbi and accelerated."""
    call = SBI_CALLS[key["call"]]
    estimator = trained(call.method, key["estimator"])
    runs = both_ways(call.sample, TRAINERS[call.method](PRIOR).build_posterior(estimator, **call.options))
    metrics, _ = time_speed_up(runs, ROUNDS[call.method])
    return metrics


def sbi_keys() -> Iterator[Json]:
    for name, call in SBI_CALLS.items():
        for kind in ESTIMATORS:
            yield {"method": call.method, "estimator": kind, "call": name, "version": version("sbi")}


# Calls of each package


def sbi_posterior() -> Any:
    return train_sbi("NPE", "maf", FEW_SIMULATIONS, max_num_epochs=FEW_EPOCHS)[0].build_posterior()


def sbi_losses(_: Any) -> Tensor:
    trainer, _ = train_sbi("NPE", "maf", FEW_SIMULATIONS, max_num_epochs=FEW_EPOCHS)
    return torch.tensor(trainer.summary["training_loss"])


def calibrate_sbi(posterior: Any, observations: int = 1000, by_density: bool = False) -> Tensor:
    """The call of https://github.com/sbi-dev/sbi/issues/1329; or by ranks of densities, for the expected coverage."""
    from sbi.diagnostics import run_sbc

    options = {"reduce_fns": posterior.log_prob} if by_density else {}
    data = simulations(observations, seed=1)
    return run_sbc(*data, posterior, num_posterior_samples=1000, show_progress_bar=False, **options)[0]


def lampe_npe() -> Any:
    from lampe.inference import NPE

    return NPE(PARAMETERS, DATA)


def pocomc_flow() -> Any:
    from pocomc.flow import Flow

    return Flow(FEATURES, "nsf6")  # The default of `pocomc.Sampler`.


def causal_nsf() -> Any:
    from causalflows.flows import CausalNSF

    return CausalNSF(FEATURES, order=torch.arange(FEATURES))


class Client(NamedTuple):
    """A call of a package that its users wait for.

    Attributes:
        package: The package's name on PyPI.
        network: The network, as the package calls it.
        line: The line that accelerates it.
        build: Makes the object that is accelerated, or imports the library, if the package makes flows inside the call.
        run: Makes the call.
        rounds: Number of timings of each way.
    """

    package: str
    network: str
    line: str
    build: Callable[[], Any]
    run: Callable[[Any], Tensor]
    rounds: int = 5


CLIENTS = {
    "run_sbc, 1,000 x 1,000 samples":
        Client("sbi", "maf", "jf.accelerate(posterior)", sbi_posterior, calibrate_sbi, rounds=1),
    "run_sbc for expected coverage, 20 x 1,000 samples":
        Client("sbi", "maf", "jf.accelerate(posterior)", sbi_posterior,
               partial(calibrate_sbi, observations=20, by_density=True), rounds=1),
    "train, 10 epochs": Client("sbi", "maf", "jf.accelerate(sbi)", lambda: sbi, sbi_losses),
    "npe.flow(x).sample((10_000,))":
        Client("lampe", "NPE, MAF", "jf.accelerate(npe)", lampe_npe,
               lambda npe: npe.flow(torch.randn(DATA)).sample((SAMPLES,))),
    "flow.sample(10_000)":
        Client("pocomc", "nsf6", "jf.accelerate(flow)", pocomc_flow, lambda flow: flow.sample(SAMPLES)[0]),
    "sample_interventional, 10,000 rows":
        Client("causalflows", "CausalNSF", "jf.accelerate(flow)", causal_nsf,
               lambda flow: flow().sample_interventional(index=0, value=1.0, sample_shape=(SAMPLES,))),
}  # fmt: skip


def measure_client(key: Json) -> Json:
    """Seconds of a call, by the package and accelerated, and the largest difference of its results."""
    client = CLIENTS[key["call"]]
    torch.manual_seed(0)
    target = client.build()
    run = client.run if isinstance(target, ModuleType) else torch.no_grad()(client.run)
    metrics, results = time_speed_up(both_ways(run, target), client.rounds)
    difference = (results["accelerated"] - results["library"]).abs().max() / results["library"].abs().max()
    return {**metrics, "error": float(difference)}


def client_keys() -> Iterator[Json]:
    for call, client in CLIENTS.items():
        names = {"package": client.package, "network": client.network, "line": client.line, "call": call}
        yield names | {"version": version(client.package)}


# Fits


def batches(data: TensorDataset, loop: str) -> Iterator[Any]:
    """The batches of an epoch: by PyTorch's loader, which takes one row at a time, or by index."""
    if loop == LOADER:
        yield from DataLoader(data, BATCH, shuffle=True)
    else:
        yield from (data[rows] for rows in torch.randperm(len(data)).split(BATCH))


def fit_zuko(key: Json) -> Json:
    """A loop of its own, and samples at one context."""
    data = TensorDataset(*standardized(FIT_SIMULATIONS))
    flow = getattr(zuko.flows, key["flow"])(PARAMETERS, DATA, transforms=TRANSFORMS, hidden_features=HIDDEN)
    optimizer = torch.optim.Adam(flow.parameters(), RATE, fused=key["loop"] == BY_INDEX)
    for _ in range(FIT_EPOCHS):
        for rows, context in batches(data, key["loop"]):
            training_step(flow, optimizer, rows, context)
    theta, x = data.tensors
    with torch.no_grad():
        flow(x[0]).sample((SAMPLES,))
        return {"loss": float(-flow(x).log_prob(theta).mean())}


def fit_npe(key: Json) -> Json:
    """sbi's posterior estimation, and samples of one posterior."""
    options = {"training_batch_size": BATCH, "max_num_epochs": FIT_EPOCHS}
    inference, _ = train_sbi("NPE", key["flow"], FIT_SIMULATIONS, **options)
    one_observation(inference.build_posterior(), SAMPLES)
    return {"loss": inference.summary["best_validation_loss"][-1]}


def rosenbrock(x: Any) -> Any:
    """The log-likelihood of pocomc's own example."""
    return -np.sum(10 * (x[:, ::2] ** 2 - x[:, 1::2]) ** 2 + (x[:, ::2] - 1) ** 2, axis=1)


def fit_pocomc(_: Json) -> Json:
    """A run of pocomc with its own settings, which trains its flow several times."""
    import pocomc

    prior = pocomc.Prior(DIMENSIONS * [uniform(-10, 20)])
    sampler = pocomc.Sampler(prior, rosenbrock, vectorize=True, random_state=1)
    sampler.run(progress=False)
    log_evidence, error = sampler.evidence()
    return {"log_evidence": float(log_evidence), "error": float(error)}


# How each program fits, and the library whose flows are accelerated.
PROGRAMS: dict[str, tuple[Callable[[Json], Json], ModuleType]] = {
    "zuko": (fit_zuko, zuko), "sbi NPE": (fit_npe, sbi), "pocomc": (fit_pocomc, zuko),
}  # fmt: skip


def measure_fit(key: Json) -> Json:
    """Seconds of a training with its samples, the least of a few rounds, and its result."""
    fit, library = PROGRAMS[key["program"]]
    seconds: dict[str, float] = {}
    results: dict[str, Json] = {}
    for _, way in product(range(FIT_ROUNDS[key["program"]]), ("library", "accelerated")):
        with jf.accelerate(library) if way == "accelerated" else nullcontext():
            started = process_time()
            results[way] = seeded(fit, key)
            seconds[way] = min(seconds.get(way, math.inf), process_time() - started)
    return {"total": seconds, "result": results, "speed_up": seconds["library"] / seconds["accelerated"]}


def fit_keys() -> Iterator[Json]:
    """All fits; the one of pocomc comes last."""
    for loop in (LOADER, BY_INDEX):
        yield {"program": "zuko", "version": version("zuko"), "flow": "MAF", "loop": loop}
    for flow in ("maf", "nsf", "zuko_maf", "zuko_nsf"):
        yield {"program": "sbi NPE", "version": version("sbi"), "flow": flow}
    yield {"program": "pocomc", "version": version("pocomc"), "flow": "nsf6"}


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    measure_files(__doc__, {
        "sbi": [(sbi_keys(), measure_sbi)],
        "clients": [(client_keys(), measure_client)],
        "fits": [(fit_keys(), measure_fit)],
    }, one_thread=["fits"])  # fmt: skip


if __name__ == "__main__":
    main()
