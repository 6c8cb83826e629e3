"""`jf.accelerate` on trained flows: of images of digits, and of posteriors as sbi builds them."""

from __future__ import annotations

import copy
import warnings
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

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMETERS = 7  # of a posterior


def logits(images: Tensor) -> Tensor:
    """Pixels of 0 to 16 with noise in between, in (0, 1), as logits."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return torch.logit(1e-2 + 0.98 * (images + noise) / 17)


def pixels(x: Tensor) -> Tensor:
    return ((torch.sigmoid(x) - 1e-2) / 0.98 * 17).floor()


class Zuko(nn.Module):
    """A MAF of three transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.MAF(64, transforms=3, hidden_features=(64, 64))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.flow().transform(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.flow().transform.inv(z)


class NFlows(nflows.flows.Flow):
    """The same in nflows."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            affine = nflows.transforms.MaskedAffineAutoregressiveTransform(64, 64, use_residual_blocks=False)
            layers += [affine, nflows.transforms.ReversePermutation(64)]
        base = nflows.distributions.StandardNormal([64])
        super().__init__(nflows.transforms.CompositeTransform(layers), base)

    def encode(self, x: Tensor) -> Tensor:
        return self.transform_to_noise(x)

    def decode(self, z: Tensor) -> Tensor:
        return self._transform.inverse(z)[0]


@pytest.mark.parametrize("kind", [Zuko, NFlows])
def test_images(kind: Any) -> None:
    images = torch.tensor(load_digits().data, dtype=torch.float32)  # 1797 of 64 pixels, 0 to 16
    torch.manual_seed(0)
    flow, x = kind(), logits(images)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    before = float(flow.log_prob(x).mean())
    for _ in range(200):
        optimizer.zero_grad()
        (-flow.log_prob(x[torch.randint(len(x), (100,))]).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
    flow.eval().requires_grad_(False)
    assert float(flow.log_prob(x).mean()) > before + 20  # it has learnt something

    for dtype, atol in ((torch.float32, 1e-2), (torch.float64, 1e-9)):
        flow, x = flow.to(dtype), logits(images[:64]).to(dtype)
        z = flow.encode(x)
        expected = flow.decode(z)
        with jf.accelerate(flow) as done, counted(flow) as calls:
            found = flow.decode(z)
        assert same_bits(expected, found)
        assert done.passes == calls
        assert len(calls) == 3
        assert all(2 < count < 48 for count in calls.values())
        assert torch.equal(pixels(found.float()), images[:64])
        torch.testing.assert_close(found, x, rtol=0, atol=atol)
    for tolerance in (1e-3, 1e-5):
        with jf.accelerate(flow, tolerance) as close:
            error = (flow.decode(z) - x).abs()
        assert sum(close.passes.values()) < sum(done.passes.values())
        assert error.max() < 1e3 * tolerance
        assert error.mean() < tolerance


def posterior(estimator: str, seed: int) -> Any:
    from sbi.inference import NPE

    torch.manual_seed(seed)
    prior = torch.distributions.MultivariateNormal(torch.zeros(PARAMETERS), torch.eye(PARAMETERS))
    theta = prior.sample((200,))
    x = theta + 0.3 * theta.roll(1, dims=1) ** 2 + 0.1 * torch.randn(200, PARAMETERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)
        inference.append_simulations(theta, x).train(max_num_epochs=1, training_batch_size=100)
        return inference.build_posterior().set_default_x(torch.zeros(1, PARAMETERS))


def drawn(posterior: Any) -> Tensor:
    torch.manual_seed(7)
    return posterior.sample((20,), show_progress_bars=False)


def test_posteriors_of_sbi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbi.inference.posteriors import EnsemblePosterior

    monkeypatch.chdir(tmp_path)  # sbi logs its training in the folder that it runs in
    parts = [posterior(estimator, seed) for seed, estimator in enumerate(("maf", "maf_rqs", "zuko_nsf"))]
    ensemble = EnsemblePosterior(parts).set_default_x(torch.zeros(1, PARAMETERS))
    counts = []
    for held in (*parts, ensemble):
        expected = drawn(held)
        density = held.log_prob(expected)
        with jf.accelerate(held) as done:
            assert same_bits(expected, drawn(held))
            assert same_bits(density, held.log_prob(expected))
            copied = copy.deepcopy(held)
        assert all(count <= PARAMETERS for count in done.passes.values())
        assert all("posterior_estimator" in name for name in done.transforms)
        assert same_bits(expected, drawn(copied))
        assert held is ensemble or done.passes.keys() == done.transforms.keys()
        counts.append(len(done.transforms))
    assert sum(counts[:-1]) == counts[-1]
    assert {what.split()[0] for what in done.transforms.values()} == {"zuko", "nflows"}
