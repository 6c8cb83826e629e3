"""Times whole fits, by the libraries as they are and accelerated: `python -m benchmarks.fits`.

Writes docs/results/fits.json, which fills docs/training.md and its chart, in a quarter of an hour on two idle cores.
A fit is a training and its samples, of the simulator of `benchmarks.sbi_flows` with five parameters. A run of pocomc
trains and samples in turn. Times are processor time of one thread. pocomc is no tool of this project: `pip install
pocomc`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import sbi
import torch
import zuko
from sbi.inference import NLE, NPE
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser, temporary_folder
from benchmarks.profiling import OPTIMIZER, POTENTIAL, Profile
from benchmarks.sbi_flows import PRIOR, observations, simulate
from jacobiflow.models.memory import keep_freed_memory

SIMULATIONS, EPOCHS, BATCH, SAMPLES = 10_000, 10, 200, 10_000
TRANSFORMS, HIDDEN, RATE, CLIP = 5, (50, 50), 5e-4, 5.0  # These are sbi's own.
TRAINING, SAMPLING, HMC, REJECTION, VARIATIONAL = "training", "sampling", "HMC", "rejection", "variational inference"
LOADER, BY_INDEX = "DataLoader, Adam", "batches by index, Adam(fused=True)"
HMC_SAMPLES, WARM_UP, REJECTION_SAMPLES, ITERATIONS = 30, 20, 200, 200
DIMENSIONS = 6  # The number of parameters of pocomc's density.
ROUNDS = {"zuko": 2, "sbi NPE": 2, "sbi NLE": 1, "pocomc": 1}


@cache
def simulations() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    theta = PRIOR.sample((SIMULATIONS,))
    return theta, simulate(theta)


def batches(data: TensorDataset, loop: str) -> Iterator[Any]:
    """The batches of an epoch: by PyTorch's loader, which takes one row at a time, or by index."""
    if loop == LOADER:
        yield from DataLoader(data, BATCH, shuffle=True)
    else:
        yield from (data[rows] for rows in torch.randperm(len(data)).split(BATCH))


def fit_zuko(watch: Profile, key: Json) -> Json:
    """A loop of its own, and samples at the observation."""
    theta, x = simulations()
    data = TensorDataset((theta - theta.mean(0)) / theta.std(0), (x - x.mean(0)) / x.std(0))
    observed = (observations()[0] - x.mean(0)) / x.std(0)
    flow = getattr(zuko.flows, key["flow"])(theta.shape[1], x.shape[1], transforms=TRANSFORMS, hidden_features=HIDDEN)
    optimizer = torch.optim.Adam(flow.parameters(), RATE, fused=key["loop"] == BY_INDEX)
    with watch.phase(TRAINING):
        for _ in range(EPOCHS):
            for rows, context in batches(data, key["loop"]):
                optimizer.zero_grad()
                (-flow(context).log_prob(rows).mean()).backward()
                torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
                optimizer.step()
    with watch.phase(SAMPLING), torch.no_grad():
        flow(observed).sample((SAMPLES,))
        loss = float(-flow(data.tensors[1]).log_prob(data.tensors[0]).mean())
    return {"loss": loss}


def fit_npe(watch: Profile, key: Json) -> Json:
    """sbi's posterior estimation, and samples of one posterior."""
    inference = NPE(PRIOR, density_estimator=key["flow"], show_progress_bars=False)
    with watch.phase(TRAINING):
        inference.append_simulations(*simulations()).train(BATCH, max_num_epochs=EPOCHS)
    with watch.phase(SAMPLING):
        inference.build_posterior().sample((SAMPLES,), x=observations()[:1], show_progress_bars=False)
    return {"loss": inference.summary["best_validation_loss"][-1]}


WEIGHTS: dict[str, Any] = {}  # The first likelihood of each kind, from which both ways sample.


def fit_nle(watch: Profile, key: Json) -> Json:
    """sbi's likelihood estimation, and samples by three of its samplers."""
    inference = NLE(PRIOR, density_estimator=key["flow"], show_progress_bars=False)
    with watch.phase(TRAINING):
        estimator = inference.append_simulations(*simulations()).train(BATCH, max_num_epochs=EPOCHS)
    estimator.load_state_dict(WEIGHTS.setdefault(key["flow"], copy.deepcopy(estimator.state_dict())))
    chain = {"num_chains": 1, "warmup_steps": WARM_UP, "thin": 1}
    for phase, count, options in (
        (HMC, HMC_SAMPLES, {"sample_with": "mcmc", "mcmc_method": "hmc_pyro", "mcmc_parameters": chain}),
        (REJECTION, REJECTION_SAMPLES, {"sample_with": "rejection"}),
        (VARIATIONAL, SAMPLES, {"sample_with": "vi", "vi_method": "rKL"}),
    ):
        torch.manual_seed(2)
        posterior = inference.build_posterior(estimator, **options).set_default_x(observations()[:1])
        with watch.phase(phase):
            if phase == VARIATIONAL:
                limits = {"max_num_iters": ITERATIONS, "check_for_convergence": False, "quality_control": False}
                posterior.train(show_progress_bar=False, **limits)
            posterior.sample((count,), show_progress_bars=False)
    return {"loss": inference.summary["best_validation_loss"][-1]}


def rosenbrock(x: Any) -> Any:
    """The log-likelihood of pocomc's own example."""
    return -np.sum(10 * (x[:, ::2] ** 2 - x[:, 1::2]) ** 2 + (x[:, ::2] - 1) ** 2, axis=1)


def run_pocomc(watch: Profile, key: Json) -> Json:
    """A run of pocomc with its own settings, whose flow is trained now and again."""
    pocomc = import_module("pocomc")
    fit = pocomc.flow.Flow.fit

    def timed_fit(*arguments: Any, **options: Any) -> Any:
        with watch.phase(TRAINING):
            return fit(*arguments, **options)

    with watch.phase(SAMPLING), patch.object(pocomc.flow.Flow, "fit", timed_fit):
        prior = pocomc.Prior(DIMENSIONS * [import_module("scipy.stats").uniform(-10, 20)])
        sampler = pocomc.Sampler(prior, rosenbrock, vectorize=True, random_state=1)
        sampler.run(progress=False)
    log_evidence, error = sampler.evidence()
    return {"log_evidence": float(log_evidence), "error": float(error)}


# How each program fits, and the library whose flows are accelerated.
PROGRAMS: dict[str, tuple[Callable[[Profile, Json], Json], ModuleType]] = {
    "zuko": (fit_zuko, zuko), "sbi NPE": (fit_npe, sbi), "sbi NLE": (fit_nle, sbi), "pocomc": (run_pocomc, zuko),
}  # fmt: skip


def measure(key: Json) -> Json:
    """Seconds of each phase and its parts and the steps of each phase, of the faster of a few rounds."""
    fit, library = PROGRAMS[key["program"]]
    simulations(), observations()  # Their own seeds must not fall into a fit.
    best: dict[str, Json] = {}
    for _, way in product(range(ROUNDS[key["program"]]), ("library", "accelerated")):
        watch = Profile()
        with watch.watching(), jf.accelerate(library) if way == "accelerated" else nullcontext():
            torch.manual_seed(1)
            np.random.seed(1)
            result = fit(watch, key)
        steps = {phase: calls[OPTIMIZER] + calls[POTENTIAL] for phase, calls in watch.calls.items()}
        seconds = {phase: dict(parts) for phase, parts in watch.seconds.items()}
        total = sum(sum(parts.values()) for parts in seconds.values())
        if way not in best or total < best[way]["total"]:
            best[way] = {"total": total, "seconds": seconds, "steps": steps, "result": result}
    columns = {name: {way: run[name] for way, run in best.items()} for name in best["library"]}
    return {**columns, "speed_up": best["library"]["total"] / best["accelerated"]["total"]}


def keys() -> Iterator[Json]:
    """All fits; the one of pocomc comes last."""
    for flow, loop in product(("MAF", "NSF"), (LOADER, BY_INDEX)):
        yield {"program": "zuko", "version": version("zuko"), "flow": flow, "loop": loop}
    for program, flows in (("sbi NPE", ("maf", "zuko_maf", "zuko_nsf")), ("sbi NLE", ("maf", "zuko_nsf"))):
        for flow in flows:
            yield {"program": program, "version": version("sbi"), "flow": flow}
    try:
        yield {"program": "pocomc", "version": version("pocomc"), "flow": "nsf6"}
    except PackageNotFoundError:
        raise SystemExit("pocomc is missing. Its row needs it: `pip install pocomc`, then run this again.") from None


def main() -> None:
    parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with temporary_folder(), warnings.catch_warnings():  # sbi logs its training where it runs
        warnings.simplefilter("ignore")
        complete(RESULTS / "fits.json", keys(), measure)


if __name__ == "__main__":
    keep_freed_memory()
    main()
