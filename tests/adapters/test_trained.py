"""`jf.accelerate` on trained flows: of images of digits, and of posteriors as sbi builds them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import pytest
import torch
import zuko
from library_flows import counted, same_bits
from sklearn.datasets import load_digits
from torch import Tensor, nn

import jacobiflow as jf

HIDDEN = 64
PARAMETERS = 7  # of a posterior


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------- images


def logits(images: Tensor) -> Tensor:
    """Pixels of 0 to 16 with noise in between, in (0, 1), as logits."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return torch.logit(1e-2 + 0.98 * (images + noise) / 17)


def pixels(x: Tensor) -> Tensor:
    return ((torch.sigmoid(x) - 1e-2) / 0.98 * 17).floor()


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """1797 images of 64 pixels, 0 to 16."""
    return torch.tensor(load_digits().data, dtype=torch.float32)


def zuko_maf() -> nn.Module:
    return zuko.flows.MAF(64, transforms=3, hidden_features=(HIDDEN, HIDDEN))


def nflows_maf() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        affine = nflows.transforms.MaskedAffineAutoregressiveTransform(64, HIDDEN, use_residual_blocks=False)
        layers += [affine, nflows.transforms.ReversePermutation(64)]
    base = nflows.distributions.StandardNormal([64])
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), base)


def log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    return flow().log_prob(x) if isinstance(flow, zuko.flows.Flow) else flow.log_prob(x)


def encode(flow: nn.Module, x: Tensor) -> Tensor:
    return flow().transform(x) if isinstance(flow, zuko.flows.Flow) else flow._transform(x)[0]


def decode(flow: nn.Module, z: Tensor) -> Tensor:
    return flow().transform.inv(z) if isinstance(flow, zuko.flows.Flow) else flow._transform.inverse(z)[0]


def _trained(build: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    flow = build()
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    before = log_prob(flow, x).mean().item()
    for _ in range(250):
        optimizer.zero_grad()
        (-log_prob(flow, x[torch.randint(len(x), (100,))]).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
    flow = flow.eval().requires_grad_(False)
    assert float(log_prob(flow, x).mean()) > before + 20  # it has learnt something
    return flow


@pytest.fixture(scope="module", params=[zuko_maf, nflows_maf], ids=lambda build: build.__name__)
def flow(request: pytest.FixtureRequest, digits: Tensor) -> nn.Module:
    return _trained(request.param, logits(digits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_encoded_images_come_back_with_the_bits_of_the_library(
    flow: nn.Module, digits: Tensor, dtype: torch.dtype
) -> None:
    used = copy.deepcopy(flow).to(dtype)
    x = logits(digits[:64]).to(dtype)
    z = encode(used, x)
    expected = decode(used, z)
    with jf.accelerate(used) as done, counted(used) as calls:
        found = decode(used, z)
    assert same_bits(expected, found)
    assert done.passes == calls
    assert len(calls) == 3
    assert all(2 < count < 48 for count in calls.values())
    assert torch.equal(pixels(found.float()), digits[:64])
    torch.testing.assert_close(found, x, rtol=0, atol=1e-2 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_encoded_images_come_back_to_a_tolerance(flow: nn.Module, digits: Tensor, tolerance: float) -> None:
    used, x = copy.deepcopy(flow).double(), logits(digits[:64]).double()
    z = encode(used, x)
    with jf.accelerate(used) as exact:
        decode(used, z)
    with jf.accelerate(used, tolerance) as done:
        found = decode(used, z)
    assert sum(done.passes.values()) < sum(exact.passes.values())
    assert float((found - x).abs().max()) < 1e3 * tolerance
    assert float((found - x).abs().mean()) < tolerance


def test_samples_of_images_are_the_same_bits(flow: nn.Module) -> None:
    def drawn() -> Tensor:
        torch.manual_seed(4)
        return flow().sample((20,)) if isinstance(flow, zuko.flows.Flow) else flow.sample(20)

    expected = drawn()
    with jf.accelerate(flow) as done:
        assert same_bits(expected, drawn())
    assert all(count < 48 for count in done.passes.values())


# ---------------------------------------------------------------------------------------------------------------- sbi


@pytest.fixture(autouse=True)
def folder_for_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbi logs its training in the folder that it runs in."""
    monkeypatch.chdir(tmp_path)


def _posterior(estimator: str, seed: int = 0) -> Any:
    from sbi.inference import NPE

    torch.manual_seed(seed)
    prior = torch.distributions.MultivariateNormal(torch.zeros(PARAMETERS), torch.eye(PARAMETERS))
    theta = prior.sample((200,))
    x = theta + 0.3 * theta.roll(1, dims=1) ** 2 + 0.1 * torch.randn(200, PARAMETERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)
        inference.append_simulations(theta, x).train(max_num_epochs=3, training_batch_size=50)
        return inference.build_posterior().set_default_x(torch.zeros(1, PARAMETERS))


def drawn(posterior: Any) -> Tensor:
    torch.manual_seed(7)
    return posterior.sample((40,), show_progress_bars=False)


@pytest.mark.parametrize("estimator", ["maf", "maf_rqs", "zuko_maf", "zuko_nsf"])
def test_posteriors_of_sbi(estimator: str) -> None:
    posterior = _posterior(estimator)
    expected = drawn(posterior)
    density = posterior.log_prob(expected)
    with jf.accelerate(posterior) as done:
        assert same_bits(expected, drawn(posterior))
        assert same_bits(density, posterior.log_prob(expected))
        assert done.passes
        assert done.passes.keys() == done.transforms.keys()
        assert all(count <= PARAMETERS for count in done.passes.values())
        assert all("posterior_estimator" in name for name in done.transforms)
        copied = copy.deepcopy(posterior)
    assert same_bits(expected, drawn(posterior))
    assert same_bits(expected, drawn(copied))
    with jf.accelerate(copied) as again:
        assert same_bits(expected, drawn(copied))
        assert again.passes
    with jf.accelerate(posterior.posterior_estimator) as inner:
        assert same_bits(expected, drawn(posterior))
    assert len(inner.transforms) == len(done.transforms)


def test_an_ensemble_of_posteriors() -> None:
    from sbi.inference.posteriors import EnsemblePosterior

    parts = [_posterior(estimator, seed) for seed, estimator in enumerate(("maf", "zuko_maf"))]
    ensemble = EnsemblePosterior(parts).set_default_x(torch.zeros(1, PARAMETERS))
    expected = drawn(ensemble)
    with jf.accelerate(ensemble) as done:
        assert same_bits(expected, drawn(ensemble))
    assert {what.split()[0] for what in done.transforms.values()} == {"zuko", "nflows"}
    assert len(done.transforms) == sum(len(jf.accelerate(part).transforms) for part in parts)
    assert done.passes
