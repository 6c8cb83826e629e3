"""`jf.accelerate` on trained flows: of images of digits, and of posteriors as sbi builds them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

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


def test_images_of_digits() -> None:
    images = torch.tensor(load_digits().data, dtype=torch.float32)  # 1797 of 64 pixels, 0 to 16
    torch.manual_seed(0)
    flow, x = zuko.flows.MAF(64, transforms=3, hidden_features=(64, 64)), logits(images)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    before = flow().log_prob(x).mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        (-flow().log_prob(x[torch.randint(len(x), (100,))]).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
    flow.eval().requires_grad_(False)
    assert float(flow().log_prob(x).mean()) > before + 20  # it has learnt something
    for dtype, atol in ((torch.float32, 1e-2), (torch.float64, 1e-9)):
        flow, x = flow.to(dtype), logits(images[:64]).to(dtype)
        z = flow().transform(x)
        expected = flow().transform.inv(z)
        with jf.accelerate(flow) as done, counted(flow) as calls:
            found = flow().transform.inv(z)
        assert same_bits(expected, found)
        assert done.passes == calls
        assert len(calls) == 3
        assert all(2 < count < 48 for count in calls.values())
        assert torch.equal(pixels(found.float()), images[:64])
        torch.testing.assert_close(found, x, rtol=0, atol=atol)
    for tolerance in (1e-3, 1e-5):
        with jf.accelerate(flow, tolerance) as close:
            error = (flow().transform.inv(z) - x).abs()
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
    parts = [posterior(estimator, seed) for seed, estimator in enumerate(("maf", "zuko_nsf"))]
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
