"""The simulator of all posteriors: "simple likelihood, complex posterior" (Papamakarios et al., 2019)."""

from __future__ import annotations

from functools import cache

import torch
from sbi.utils import BoxUniform
from torch import Tensor

PARAMETERS, DATA = 5, 8
LIMIT = 3.0
PRIOR = BoxUniform(-LIMIT * torch.ones(PARAMETERS), LIMIT * torch.ones(PARAMETERS))
OBSERVED = torch.tensor([0.7, -2.9, -1.0, -0.9, 0.6])  # parameters of the observation


def simulate(theta: Tensor) -> Tensor:
    """Four points (B, 8) of a Gaussian in the plane: its mean, roots of its deviations, and its correlation by tanh."""
    mean, deviations, correlation = theta[:, None, :2], theta[:, None, 2:4].square(), theta[:, None, 4:].tanh()
    first, second = torch.randn(2, len(theta), 4, 1)
    second = correlation * first + (1 - correlation.square()).sqrt() * second
    return (mean + deviations * torch.cat([first, second], dim=-1)).flatten(1)


@cache
def simulations(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Parameters (B, 5) of the prior and their data (B, 8), the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theta = PRIOR.sample((count,))
        return theta, simulate(theta)


def standardized(count: int) -> tuple[Tensor, Tensor]:
    """Simulations of mean 0 and deviation 1, as networks are trained on."""
    theta, x = ((each - each.mean(0)) / each.std(0) for each in simulations(count))
    return theta, x


@cache
def observations(count: int = 100) -> Tensor:
    """The observation, and others whose parameters are of the prior."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return simulate(torch.cat([OBSERVED[None], PRIOR.sample((count - 1,))]))
