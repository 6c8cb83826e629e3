"""Training, variational inference and Hamiltonian steps with accelerated flows end where the library's own do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import nflows.transforms as nf
import normflows
import pyro.distributions as dist
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.library_flows import default_dtype, gradient_gap, normal

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

DOUBLE = torch.float64
EXACT = 1e-9  # relative to the largest entry


def two_moons(rows: int, seed: int) -> Tensor:
    angle, sign = math.pi * torch.arange(rows) / rows, 1 - 2 * (torch.arange(rows) % 2)
    moons = torch.stack([angle.cos() - 0.5 * sign, sign * (angle.sin() - 0.25)], dim=1)
    return moons + 0.1 * normal(rows, 2, seed=seed)


def train(flow: nn.Module, log_prob: Callable[[Tensor], Tensor], steps: int, accelerated: str = "") -> float:
    """Returns the loss after training; accelerated "before" or "after" the optimizer is made, or not at all."""
    data, generator = two_moons(2000, seed=0), torch.Generator().manual_seed(0)
    handle = jf.accelerate(flow) if accelerated == "before" else None
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3, weight_decay=1e-4)
    handle = jf.accelerate(flow) if accelerated == "after" else handle
    for _ in range(steps):
        optimizer.zero_grad()
        (-log_prob(data[torch.randint(len(data), (32,), generator=generator)]).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
    if handle is not None:
        assert set(handle.backends.values()) == {"native"}
        handle.restore()
    return float(-log_prob(data).mean().detach())


def zuko_maf() -> tuple[Any, Callable[[Tensor], Tensor]]:
    flow = zuko.flows.MAF(2, transforms=2, hidden_features=(16, 16))
    return flow, lambda x: flow().log_prob(x)


def nflows_maf() -> tuple[Any, Callable[[Tensor], Tensor]]:
    masked = partial(nf.MaskedAffineAutoregressiveTransform, 2, 16, num_blocks=1, activation=torch.tanh)  # sbi's
    flow = Flow(nf.CompositeTransform([masked(), nf.ReversePermutation(2), masked()]), StandardNormal([2]))
    return flow, flow.log_prob


@pytest.mark.parametrize(("build", "accelerated"), [(zuko_maf, "before"), (nflows_maf, "after")])
def test_training_ends_at_the_loss_of_the_library(build: Callable[[], Any], accelerated: str) -> None:
    losses = []
    for when in ("", accelerated):
        torch.manual_seed(0)
        losses.append(train(*build(), steps=1000, accelerated=when))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_hamiltonian_steps_of_a_trained_spline_flow() -> None:
    torch.manual_seed(0)
    flow: Any = zuko.flows.NSF(2, transforms=3, hidden_features=(32, 32))
    train(flow, lambda x: flow().log_prob(x), 50, "before")
    flow.requires_grad_(False)
    double, x = copy.deepcopy(flow).double(), two_moons(200, seed=1)

    def force(flow: Any, x: Tensor) -> Tensor:
        return torch.autograd.grad(flow().log_prob(x.requires_grad_()).sum(), x)[0]

    def positions() -> Tensor:
        x, momentum = two_moons(50, seed=1).double(), normal(50, 2, seed=2, dtype=DOUBLE)
        for _ in range(10):
            momentum = momentum + 0.05 * force(double, x)
            x = (x + 0.05 * momentum).detach()
        return x

    exact, original, expected = force(double, x.double()), force(flow, x), positions()
    with jf.accelerate([flow, double]) as handle:
        ours = force(flow, x)
        torch.testing.assert_close(positions(), expected, rtol=0, atol=1e-9)
    assert set(handle.backends.values()) == {"native"}
    errors = [((result - exact).norm(dim=1) / exact.norm(dim=1)).median() for result in (ours, original)]
    assert errors[0] <= 2 * errors[1] + 1e-7


def target(x: Tensor) -> Tensor:
    """The log-density of a reverse Kullback-Leibler divergence."""
    return x[..., 0].sin() - x.square().sum(dim=-1) / 4


def zuko_losses(kind: Any) -> Any:
    flow, x, c = kind(4, 2), torch.rand(6, 4), torch.randn(6, 2)

    def losses() -> list[Tensor]:
        samples, log_prob = flow(c[0]).rsample_and_log_prob((3, 2))
        return [flow(c).log_prob(x), flow(c[0]).log_prob(x), target(flow(c).rsample((3,))), log_prob - target(samples)]

    return flow, losses


def nflows_losses() -> Any:
    parts = [nf.MaskedAffineAutoregressiveTransform(4, 16, context_features=2), nf.RandomPermutation(4)]
    flow, x, c = Flow(nf.CompositeTransform(parts), StandardNormal([4])), torch.randn(6, 4), torch.randn(6, 2)

    def losses() -> list[Tensor]:
        samples, log_prob = flow.sample_and_log_prob(3, c)
        return [flow.log_prob(x, c), log_prob - target(samples)]

    return flow, losses


def normflows_losses() -> Any:
    parts = [normflows.flows.MaskedAffineAutoregressive(4, 16), normflows.flows.Permute(4)]
    flow, x = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), parts), torch.randn(6, 4)

    def losses() -> list[Tensor]:
        samples, log_prob = flow.sample(3)
        return [flow.log_prob(x), flow.forward_kld(x), log_prob - target(samples)]

    return flow, losses


def pyro_losses() -> Any:
    parts = nn.ModuleList([pt.affine_autoregressive(4, [16]), pt.spline_autoregressive(4, [16])])
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), list(parts))
    x = torch.randn(6, 4)

    def losses() -> list[Tensor]:
        samples = flow.rsample((5,))
        results = [flow.log_prob(samples) - target(samples)]
        flow.clear_cache()
        return [*results, flow.log_prob(x)]

    return parts, losses


DENSITIES: dict[str, Callable[[], Any]] = {
    "zuko MAF": partial(zuko_losses, zuko.flows.MAF), "zuko NSF": partial(zuko_losses, zuko.flows.NSF),
    "zuko NCSF": partial(zuko_losses, zuko.flows.NCSF), "nflows": nflows_losses, "normflows": normflows_losses,
    "pyro": pyro_losses,
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
@default_dtype(DOUBLE)
def test_losses_of_densities_and_samples(name: str) -> None:
    torch.manual_seed(0)
    flow, losses = DENSITIES[name]()

    def derivatives() -> list[Any]:
        torch.manual_seed(5)
        means, parameters = [loss.mean() for loss in losses()], [*flow.parameters()]
        each = (torch.autograd.grad(mean, parameters, allow_unused=True) for mean in means)
        return [*map(Tensor.detach, means), *(gradient for gradients in each for gradient in gradients)]

    expected = derivatives()
    with jf.accelerate(flow) as handle:
        assert gradient_gap(expected, derivatives()) < EXACT
    assert set(handle.backends.values()) == {"native"}
