"""Times packages that build on masked flows, as they are and accelerated: `python -m benchmarks.clients`.

Writes docs/results/clients.json, which fills docs/works_with.md, in three minutes on two idle cores. Each package
makes its own object by its public interface. A package that is not installed is left out: `pip install pocomc
causalflows`. ltu-ili has its own installation page.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser, temporary_folder, time_speed_up
from jacobiflow.models.memory import keep_freed_memory

FEATURES, PARAMETERS, DATA = 10, 5, 8  # Features of flows of random weights, parameters and data of simulations.
SIMULATIONS, EPOCHS, ROWS, OBSERVATIONS = 2_000, 10, 10_000, 100


def simulations(count: int = SIMULATIONS) -> tuple[Tensor, Tensor]:
    """Parameters of a uniform prior, and noisy data: the parameters, and the squares of three of them."""
    theta = 2 * torch.rand(count, PARAMETERS) - 1
    data = torch.cat([theta, theta[:, : DATA - PARAMETERS].square()], dim=1)
    return theta, data + 0.1 * torch.randn(count, DATA)


def zuko_nsf() -> Any:
    """The flow of https://github.com/probabilists/zuko/issues/2."""
    import zuko

    return zuko.flows.NSF(200, 5, transforms=1, hidden_features=[128] * 2)


def nflows_maf() -> Any:
    from nflows.flows import MaskedAutoregressiveFlow

    return MaskedAutoregressiveFlow(FEATURES, hidden_features=64, num_layers=5, num_blocks_per_layer=2)


def normflows_nsf() -> Any:
    """Transforms and permutations in turn, as in the package's own example."""
    import normflows as nf

    flows: list[Any] = []
    for _ in range(5):
        flows += [nf.flows.AutoregressiveRationalQuadraticSpline(FEATURES, 2, 64), nf.flows.LULinearPermute(FEATURES)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES, trainable=False), flows)


def pyro_iaf() -> Any:
    from pyro.distributions.transforms import affine_autoregressive, iterated

    return iterated(5, affine_autoregressive, FEATURES)


def pyro_density(transforms: Any) -> Tensor:
    import pyro.distributions as dist

    base = dist.Normal(torch.zeros(FEATURES), torch.ones(FEATURES)).to_event(1)
    return dist.TransformedDistribution(base, transforms.parts).log_prob(torch.randn(ROWS, FEATURES))


def sbi_prior() -> Any:
    from sbi.utils import BoxUniform

    return BoxUniform(-torch.ones(PARAMETERS), torch.ones(PARAMETERS))


def train_sbi(kind: str) -> Any:
    from sbi.inference import NPE

    inference = NPE(sbi_prior(), density_estimator=kind, show_progress_bars=False)
    inference.append_simulations(*simulations()).train(max_num_epochs=EPOCHS)
    return inference


def sbi_posterior(kind: str) -> Any:
    return train_sbi(kind).build_posterior()


def sbi_losses(_: Any) -> Tensor:
    return torch.tensor(train_sbi("maf").summary["training_loss"])


def sample_sbi(posterior: Any) -> Tensor:
    return posterior.sample((ROWS,), x=simulations(1)[1], show_progress_bars=False)


def calibrate_sbi(posterior: Any) -> Tensor:
    """The call of https://github.com/sbi-dev/sbi/issues/1329."""
    from sbi.diagnostics import run_sbc

    ranks, _ = run_sbc(*simulations(OBSERVATIONS), posterior, num_posterior_samples=1000, show_progress_bar=False)
    return ranks


def lampe_npe() -> Any:
    from lampe.inference import NPE

    return NPE(PARAMETERS, DATA)


def lampe_losses(_: Any) -> Tensor:
    from lampe.inference import NPELoss
    from lampe.utils import GDStep

    estimator, (theta, x) = lampe_npe(), simulations()
    loss, step = NPELoss(estimator), GDStep(torch.optim.Adam(estimator.parameters(), 1e-3), clip=1.0)
    batches = [rows for _ in range(EPOCHS) for rows in torch.randperm(SIMULATIONS).split(200)]
    return torch.stack([step(loss(theta[rows], x[rows])) for rows in batches])


def ili_posterior() -> Any:
    import ili

    runner = ili.inference.InferenceRunner.load(
        backend="lampe",
        engine="NPE",
        prior=ili.utils.Uniform(low=[-1] * PARAMETERS, high=[1] * PARAMETERS),
        nets=[ili.utils.load_nde_lampe(model="maf")],
        train_args={"max_epochs": EPOCHS},
    )
    theta, x = (values.numpy() for values in simulations())
    posterior, _ = runner(ili.dataloaders.NumpyLoader(x, theta))
    return posterior


def validate_ili(posterior: Any) -> Tensor:
    """Samples at each observation of a test set: https://github.com/maho3/ltu-ili/issues/181."""
    from ili.validation import PosteriorSamples

    theta, x = (values.numpy() for values in simulations(OBSERVATIONS))
    return torch.from_numpy(PosteriorSamples(num_samples=1000, sample_method="direct")(posterior, x, theta))


def pocomc_flow() -> Any:
    from pocomc.flow import Flow

    return Flow(FEATURES, "nsf6")  # The default of `pocomc.Sampler`.


def run_pocomc(_: Any) -> Tensor:
    import pocomc
    from scipy.stats import norm

    def log_likelihood(x: Any) -> Any:
        return -0.5 * np.sum((x[:, 1:] - x[:, :-1] ** 2) ** 2 / 0.1 + x[:, :-1] ** 2, axis=1)

    prior = pocomc.Prior([norm(0, 3)] * 4)
    sampler = pocomc.Sampler(prior, log_likelihood, n_effective=256, n_active=128, vectorize=True, random_state=0)
    sampler.run(n_total=512, n_evidence=512, progress=False)
    return torch.tensor(sampler.evidence())


def causal_nsf() -> Any:
    from causalflows.flows import CausalNSF

    return CausalNSF(FEATURES, order=torch.arange(FEATURES))


def intervene(flow: Any) -> Tensor:
    return flow().sample_interventional(index=0, value=1.0, sample_shape=(ROWS,))


class Client(NamedTuple):
    """A call of a package that its users wait for.

    Attributes:
        package: The package's name on PyPI.
        network: The network, as the package calls it.
        line: The line that accelerates it.
        call: The call that is timed.
        build: Makes the object that is accelerated, or imports the library, if the package makes flows inside the call.
        run: Makes the call.
        rounds: Number of timings of each way.
        is_repeatable: Whether equal random numbers give equal results up to rounding. Those of a Markov chain do not.
    """

    package: str
    network: str
    line: str
    call: str
    build: Callable[[], Any]
    run: Callable[[Any], Tensor]
    rounds: int = 5
    is_repeatable: bool = True


CLIENTS = (
    Client("zuko", "NSF, 200 features", "jf.accelerate(flow)", "flow(c).sample((64,))",
           zuko_nsf, lambda flow: flow(torch.randn(5)).sample((64,))),
    Client("nflows", "MaskedAutoregressiveFlow", "jf.accelerate(flow)", "flow.sample(10_000)",
           nflows_maf, lambda flow: flow.sample(ROWS)),
    Client("normflows", "AutoregressiveRationalQuadraticSpline", "jf.accelerate(flow)", "flow.sample(10_000)",
           normflows_nsf, lambda flow: flow.sample(ROWS)[0]),
    Client("pyro-ppl", "affine_autoregressive", "jf.accelerate(transforms)", "log_prob, 10,000 rows",
           pyro_iaf, pyro_density),
    Client("sbi", "maf", "jf.accelerate(posterior)", "posterior.sample((10_000,))",
           partial(sbi_posterior, "maf"), sample_sbi),
    Client("sbi", "zuko_nsf", "jf.accelerate(posterior)", "posterior.sample((10_000,))",
           partial(sbi_posterior, "zuko_nsf"), sample_sbi),
    Client("sbi", "maf", "jf.accelerate(posterior)", "run_sbc, 100 x 1,000 samples",
           partial(sbi_posterior, "maf"), calibrate_sbi, rounds=2),
    Client("sbi", "maf", "jf.accelerate(sbi)", "train, 10 epochs", partial(import_module, "sbi"), sbi_losses),
    Client("lampe", "NPE, MAF", "jf.accelerate(npe)", "npe.flow(x).sample((10_000,))",
           lampe_npe, lambda npe: npe.flow(torch.randn(DATA)).sample((ROWS,))),
    Client("lampe", "NPE, MAF", "jf.accelerate(zuko)", "GDStep, 100 steps",
           partial(import_module, "zuko"), lampe_losses),
    Client("ltu-ili", "NPE, maf of lampe", "jf.accelerate(posterior)", "PosteriorSamples, 100 x 1,000 samples",
           ili_posterior, validate_ili, rounds=2),
    Client("pocomc", "nsf6", "jf.accelerate(flow)", "flow.sample(10_000)",
           pocomc_flow, lambda flow: flow.sample(ROWS)[0]),
    Client("pocomc", "nsf6", "jf.accelerate(zuko)", "Sampler.run, 4 parameters",
           partial(import_module, "zuko"), run_pocomc, rounds=1, is_repeatable=False),
    Client("causalflows", "CausalNSF", "jf.accelerate(flow)", "sample_interventional, 10,000 rows",
           causal_nsf, intervene),
)  # fmt: skip


def seeded(run: Callable[[Any], Tensor], target: Any) -> Tensor:
    """Makes a call from the same random numbers each time."""
    torch.manual_seed(1)
    np.random.seed(1)
    return run(target)


def with_library(run: Callable[[Any], Tensor], library: ModuleType) -> Tensor:
    """Makes a call in which the library's new flows are accelerated."""
    with jf.accelerate(library):
        return seeded(run, library)


def measure(key: Json) -> Json:
    """Seconds of a call, by the package and accelerated, and the largest difference of its results."""
    client = next(client for client in CLIENTS if key.items() >= describe(client).items())
    torch.manual_seed(0)
    target = client.build()
    if isinstance(target, ModuleType):
        runs = {
            "library": partial(seeded, client.run, target),
            "accelerated": partial(with_library, client.run, target),
        }
    else:
        fast = copy.deepcopy(target)
        jf.accelerate(fast)
        sample = torch.no_grad()(partial(seeded, client.run))
        runs = {"library": partial(sample, target), "accelerated": partial(sample, fast)}
    metrics, results = time_speed_up(runs, client.rounds)
    difference = (results["accelerated"] - results["library"]).abs().max() / results["library"].abs().max()
    return {**metrics, "error": float(difference) if client.is_repeatable else None}


def describe(client: Client) -> Json:
    return {name: getattr(client, name) for name in ("package", "network", "line", "call")}


def keys() -> Iterator[Json]:
    """All calls of the packages that are installed."""
    for client in CLIENTS:
        try:
            yield describe(client) | {"version": version(client.package)}
        except PackageNotFoundError:
            print(f"{client.package} is not installed: `{client.call}` is left out")


def main() -> None:
    parser(__doc__).parse_args()
    logging.disable(logging.WARNING)
    with temporary_folder(), warnings.catch_warnings():  # sbi logs its training where it runs
        warnings.simplefilter("ignore")
        complete(RESULTS / "clients.json", keys(), measure)


if __name__ == "__main__":
    keep_freed_memory()
    main()
