"""Densities, samples and training of whole flows: with acceleration they end where the library's own do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.library_flows import default_dtype, gradient_gap, same_bits, steep

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

EXACT = 1e-9  # relative to the largest entry

Calls = tuple[nn.Module, Callable[[], list[Tensor]]]
"""A flow, and log-densities and functions of its samples."""


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with default_dtype(torch.float64):
        yield


def target(x: Tensor) -> Tensor:
    """The log-density of a reverse Kullback-Leibler divergence."""
    return x[..., 0].sin() - x.square().sum(dim=-1) / 4


def zuko_calls(kind: Any, form: str = "") -> Calls:
    flow, x, c = steep(kind(4, 2)), torch.rand(6, 4), torch.randn(6, 2)
    if form == "inverse":  # Its slow side is the density.
        flow = zuko.lazy.Flow([part.inv for part in flow.transform.transforms], flow.base)
    if form == "mixed":  # Native code does not take the last transform.
        last = zuko.lazy.UnconditionalTransform(zuko.transforms.SignedPowerTransform, torch.full((4,), 0.1))
        flow = zuko.lazy.Flow([*flow.transform.transforms, last], flow.base)

    def calls() -> list[Tensor]:
        samples, log_prob = flow(c[0]).rsample_and_log_prob((3, 2))
        rest = [flow(c[0]).log_prob(x), target(flow(c).rsample((3,))), flow(c).sample((0,)), flow(c).sample((2,))]
        return [flow(c).log_prob(x), log_prob - target(samples), *rest]

    return flow, calls


def nflows_calls(form: str = "") -> Calls:
    parts = [nf.MaskedAffineAutoregressiveTransform(4, 16, context_features=2), nf.RandomPermutation(4)]
    if form == "mixed":  # Native code does not take the transform in the middle.
        parts = [*parts, nf.LeakyReLU(), nf.CompositeTransform(copy.deepcopy(parts[::-1]))]
    flow, x, c = Flow(nf.CompositeTransform(parts), StandardNormal([4])), torch.randn(6, 4), torch.randn(6, 2)

    def calls() -> list[Tensor]:
        samples, log_prob = flow.sample_and_log_prob(3, c)
        return [flow.log_prob(x, c), log_prob - target(samples)]

    return flow, calls


def normflows_calls(form: str = "") -> Calls:
    parts = [normflows.flows.MaskedAffineAutoregressive(4, 16), normflows.flows.Permute(4)]
    if form == "mixed":
        parts = [*parts, normflows.flows.AffineConstFlow(4), *copy.deepcopy(parts)]
    flow, x = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), parts), torch.randn(6, 4)

    def calls() -> list[Tensor]:
        samples, log_prob = flow.sample(3)
        return [flow.log_prob(x), flow.forward_kld(x), log_prob - target(samples), target(flow(x)), flow.inverse(x)]

    return flow, calls


def pyro_calls() -> Calls:
    parts = nn.ModuleList([pt.affine_autoregressive(4, [16]), pt.spline_autoregressive(4, [16])])
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), list(parts))
    x = torch.randn(6, 4)

    def calls() -> list[Tensor]:
        samples = flow.rsample((5,))
        results = [flow.log_prob(samples) - target(samples)]
        flow.clear_cache()
        return [*results, flow.log_prob(x)]

    return parts, calls


DENSITIES: dict[str, Callable[[], Calls]] = {
    "zuko MAF": partial(zuko_calls, zuko.flows.MAF), "zuko NSF": partial(zuko_calls, zuko.flows.NSF),
    "zuko NCSF": partial(zuko_calls, zuko.flows.NCSF), "zuko inverse": partial(zuko_calls, zuko.flows.MAF, "inverse"),
    "zuko mixed": partial(zuko_calls, zuko.flows.MAF, "mixed"), "nflows": nflows_calls,
    "nflows mixed": partial(nflows_calls, "mixed"), "normflows": normflows_calls,
    "normflows mixed": partial(normflows_calls, "mixed"), "pyro": pyro_calls,
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
def test_log_densities_samples_and_their_gradients(name: str) -> None:
    torch.manual_seed(0)
    flow, calls = DENSITIES[name]()
    parameters = [*flow.parameters()]

    def results() -> list[Tensor]:
        torch.manual_seed(5)
        return [*calls(), torch.get_rng_state()]

    def gradients() -> list[Any]:
        each = (torch.autograd.grad(part.mean(), parameters, allow_unused=True) for part in results() if part.grad_fn)
        return [gradient for gradients in each for gradient in gradients]

    expected, derived = results(), gradients()
    with jf.accelerate(flow) as handle:
        for original, ours in zip(expected, results(), strict=True):
            torch.testing.assert_close(ours, original, rtol=1e-9, atol=1e-9)
        assert gradient_gap(derived, gradients()) < EXACT
    assert set(handle.backends.values()) == {"native"}
    with torch.no_grad(), jf.accelerate(flow, 0.0):
        assert same_bits(expected, results())


@pytest.mark.parametrize("name", ["zuko MAF", "zuko NSF", "nflows", "normflows", "pyro"])
def test_training_ends_at_the_weights_of_the_library(name: str) -> None:
    answers = []
    for accelerated in ("never", "before the optimizer is made", "after it"):
        torch.manual_seed(0)
        flow, calls = DENSITIES[name]()
        if accelerated.startswith("before"):
            jf.accelerate(flow)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-3, weight_decay=1e-4)
        if accelerated.startswith("after"):
            jf.accelerate(flow)
        for _ in range(5):
            optimizer.zero_grad()
            sum(part.mean() for part in calls() if part.grad_fn).backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimizer.step()
        answers.append([weight.detach() for weight in flow.parameters()])
    assert max(gradient_gap(answers[0], weights) for weights in answers[1:]) < 1e-7


@pytest.mark.parametrize("is_alone", [False, True])
def test_log_determinants_of_transforms_of_single_features(is_alone: bool) -> None:
    """zuko adds up those of a composition if there is a transform of several features after it."""
    last = None if is_alone else zuko.flows.MaskedAutoregressiveTransform(6, activation=nn.Mish)
    scales = [
        zuko.lazy.UnconditionalTransform(torch.distributions.AffineTransform, torch.zeros(6), k * torch.ones(6))
        for k in (2, 3)
    ]
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(6), torch.ones(6))
    flow, x = zuko.lazy.Flow([*scales, *([last] if last is not None else [])], base), torch.randn(50, 6)

    def calls() -> list[Tensor]:
        torch.manual_seed(1)
        both = zuko.lazy.LazyComposedTransform(*scales)
        composed = both if last is None else flow.transform
        ladj = [each.call_and_ladj(x)[1] for each in (composed(), composed().inv)]
        return [flow().log_prob(x), *ladj, *flow().rsample_and_log_prob((50,))]

    expected = calls()
    with jf.accelerate(zuko), jf.accelerate(flow):
        assert gradient_gap(expected, calls()) < EXACT


def test_a_density_without_a_number_is_nan() -> None:
    """Of a base with a negative scale, and of log-scales that overflow."""
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(3), -torch.ones(3))
    flow, network = zuko.lazy.Flow(zuko.flows.MAF(3).transform, base), AutoRegressiveNN(3, [8])
    with torch.no_grad():
        network.layers[-1].bias[3:] = torch.inf
    transform, x = pt.AffineAutoregressive(network), torch.zeros(2, 3)
    with jf.accelerate(nn.ModuleList([flow, transform])):
        assert flow().log_prob(x).isnan().all()
        assert transform.log_abs_det_jacobian(x, transform(x)).isnan().all()
