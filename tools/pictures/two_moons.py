"""The two-moons simulator of simulation-based inference, its exact posterior, and the posterior by sbi."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import sbi
import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from torch import Tensor

import jacobiflow as jf

SIMULATIONS, SAMPLES = 10_000, 2_000


class Posteriors(NamedTuple):
    """Samples (N, 2) of the parameters at the observation (0, 0): exact, by sbi, and by sbi accelerated.

    The last two start from the same random numbers.
    """

    exact: Tensor
    library: Tensor
    accelerated: Tensor


def draw_crescent(count: int) -> Tensor:
    """Points (N, 2) about half a circle of radius 0.1, to which the simulator adds a function of the parameters."""
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    return torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), dim=1)


def simulate(theta: Tensor) -> Tensor:
    """Data x = p + (-|a + b|, b - a) / sqrt(2) of parameters (a, b), where p is a point of the crescent."""
    total, difference = theta.sum(dim=1), theta[:, 1] - theta[:, 0]
    return draw_crescent(len(theta)) + torch.stack((-total.abs(), difference), dim=1) / math.sqrt(2)


def draw_exactly(count: int) -> Tensor:
    """Parameters of the posterior at x = 0 under a uniform prior: the simulator's equation, solved for them."""
    total, difference = (math.sqrt(2) * draw_crescent(count)).unbind(dim=1)
    total, difference = total * torch.randint(2, (count,)).mul(2).sub(1), -difference
    return torch.stack((total - difference, total + difference), dim=1) / 2


@cache
def posteriors() -> Posteriors:
    """Trains an estimator, and samples its posterior without acceleration and with it."""
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample(torch.Size((SIMULATIONS,)))
    inference = NPE(prior, density_estimator="zuko_nsf", show_progress_bars=False)
    inference.append_simulations(theta, simulate(theta))
    with jf.accelerate(sbi):
        inference.train()
    posterior = inference.build_posterior()

    def draw() -> Tensor:
        torch.manual_seed(1)
        return posterior.sample((SAMPLES,), x=torch.zeros(2), show_progress_bars=False)

    library = draw()
    with jf.accelerate(posterior):
        accelerated = draw()
    return Posteriors(draw_exactly(SAMPLES), library, accelerated)
