"""pyro's autoregressive transforms against their own inverses, and lampe's flows, which are zuko's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lampe
import pyro.distributions as dist
import pyro.distributions.transforms as pt
import pytest
import torch
from library_flows import normal, same_bits
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

import jacobiflow as jf

torch.distributions.Distribution.set_default_validate_args(False)  # as zuko has it; importing pyro turns checks on
pytestmark = pytest.mark.usefixtures("one_thread")

D, C = 7, 3
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: pt.affine_autoregressive(D, [32, 32]),
    "skip": lambda: pt.AffineAutoregressive(AutoRegressiveNN(D, [32], skip_connections=True, nonlinearity=nn.Tanh())),
    "linear spline": lambda: pt.spline_autoregressive(D, [32]),
    "quadratic spline": lambda: pt.SplineAutoregressive(
        D, AutoRegressiveNN(D, [32], param_dims=[8, 8, 7]), order="quadratic"
    ),
    "conditional affine": lambda: pt.conditional_affine_autoregressive(D, C, [32]),
    "conditional spline": lambda: pt.conditional_spline_autoregressive(D, C, [32]),
}


def transform(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[name]()


def inverse(flow: Any, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """x and log|det dy/dx| of y; pyro keeps both for the y that it saw last, so it is given a copy."""
    own = flow.condition(c) if hasattr(flow, "condition") else flow
    y = y.clone()
    x = own.inv(y)
    return x, own.log_abs_det_jacobian(x, y)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (3000,)])
@pytest.mark.parametrize("name", BUILDS)
def test_inverses_and_log_determinants_are_pyro_s(name: str, shape: tuple[int, ...]) -> None:
    flow, y, c = transform(name), normal(*shape, D), normal(*shape, C, seed=1)
    with torch.no_grad():
        expected = inverse(flow, y, c)
        for tolerance in (0.0, 1e-5):
            with jf.accelerate(flow, tolerance) as done:
                found = inverse(flow, y, c)
            assert done.passes[""] <= D
            if tolerance == 0:
                assert same_bits(expected, found)
            else:
                assert (expected[0] - found[0]).abs().max() < 1e-2
                assert (expected[1] - found[1]).abs().quantile(0.99) < 1e-2
    assert shape != (3000,) or done.ways == {"": "units"}


@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
@pytest.mark.parametrize("rows", [5, 3000])
@pytest.mark.parametrize("where", ["input", "last feature", "large", "context", "weights"])
@pytest.mark.parametrize("name", ["affine", "skip", "linear spline", "conditional affine"])
@torch.no_grad()
def test_values_that_are_not_finite_are_pyro_s(name: str, where: str, rows: int, tolerance: float) -> None:
    flow, y, c = transform(name), normal(rows, D), normal(rows, C, seed=1)
    last = int(flow.nn.permutation[-1] if "conditional" in name else flow.arn.permutation[-1])
    weights = [weight for weight in flow.parameters() if weight.ndim == 2]
    if where == "input":
        y[2, 3], y[4, 0] = torch.nan, -torch.inf
    elif where == "last feature":
        y[2, last] = torch.inf
    elif where == "large":  # passes of all features overflow
        y[:, last] = 3e38
    elif where == "context":
        c[2, 1] = torch.nan
    else:
        weights[0][3, -1] = torch.inf
    expected = inverse(flow, y, c)
    with jf.accelerate(flow, tolerance):
        found = inverse(flow, y, c)
    if tolerance == 0:
        assert same_bits(expected, found)
    assert same_bits(expected[0].isfinite(), found[0].isfinite())
    assert same_bits(expected[1].isfinite(), found[1].isfinite())


@torch.no_grad()
def test_strides_and_integers_are_taken_as_pyro_takes_them() -> None:
    flow = transform("affine")
    for y in (normal(D, 3).t(), normal(D, 2, 4).permute(1, 2, 0), torch.arange(5 * D).view(5, D) % 4):
        expected = flow._inverse(y)
        with jf.accelerate(flow, 0.0) as done:
            assert same_bits(expected, flow._inverse(y))
        assert done.ways == {"": "passes"}


class Doubled(nn.Module):
    """A user's network."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AutoRegressiveNN(D, [32])
        self.permutation, self.func = self.inner.permutation, torch.tanh  # a name that partial calls have too

    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * part for part in self.inner(x)]


@pytest.mark.parametrize("rows", [5, 3000])
@torch.no_grad()
def test_networks_of_the_user(rows: int) -> None:
    flow, y = pt.AffineAutoregressive(Doubled()), normal(rows, D)
    expected = inverse(flow, y, y)
    with jf.accelerate(flow, 0.0) as done:
        assert same_bits(expected, inverse(flow, y, y))
    assert done.ways == {"": "passes"}


@torch.no_grad()
def test_the_default_type_is_pyro_s_first_iterate() -> None:
    flow, y = transform("affine").double(), normal(3000, D, dtype=torch.float64)
    try:
        torch.set_default_dtype(torch.float64)
        expected = flow._inverse(y)
        with jf.accelerate(flow, 1e-9) as done:
            assert (flow._inverse(y) - expected).abs().max() < 1e-6
    finally:
        torch.set_default_dtype(torch.float32)
    assert done.ways == {"": "units"}


@pytest.mark.parametrize("name", ["affine", "linear spline"])
def test_densities_and_their_gradients_are_pyro_s(name: str) -> None:
    flow, y = transform(name), normal(6, D)
    normal_base = dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)

    def calls() -> list[Tensor]:
        density = dist.TransformedDistribution(normal_base, [flow]).log_prob(y.clone())
        return [density, *torch.autograd.grad(density.sum(), [*flow.parameters()])]

    expected = calls()
    with jf.accelerate(flow, 0.0):
        found = calls()
    assert same_bits(expected[0], found[0])
    for own, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_copies_pickles_and_what_is_left_alone() -> None:
    flow, y, c = transform("affine"), normal(4, D), normal(4, C)
    kind, expected = type(flow), inverse(flow, y, c)
    with jf.accelerate(flow, 0.0):
        copied = copy.deepcopy(flow)
        loaded = pickle.loads(pickle.dumps(flow))
    assert type(flow) is type(loaded) is type(copied) is kind
    for each in (copied, loaded):
        assert same_bits(expected, inverse(each, y, c))
    stable = pt.affine_autoregressive(D, [32], stable=True)
    with pytest.raises(ValueError, match="its _inverse was replaced"):
        jf.accelerate(stable, 0.0)


def test_estimators_of_lampe() -> None:
    torch.manual_seed(0)
    estimator = lampe.inference.NPE(D, C, transforms=2, hidden_features=(32, 32))
    context = normal(C)

    def drawn() -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return estimator.flow(context).sample((2000,))

    expected = drawn()
    with jf.accelerate(estimator, 0.0) as done:
        assert same_bits(expected, drawn())
    assert len(done.transforms) == 2
