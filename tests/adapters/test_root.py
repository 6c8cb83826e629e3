"""Roots of monotone functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from torch import Tensor

import jacobiflow as jf
from jacobiflow.adapters.root import find_bound, find_root
from tests.helpers.library_flows import exact_bisection, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_exact_to_rounding_or_the_nearer_bound(dtype: torch.dtype) -> None:
    points, calls = torch.linspace(-3, 3, 101, dtype=dtype), []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x**3 + torch.tanh(20 * x)

    x = find_root(function, function(points), 2.0)
    assert (x - points.clamp(-2, 2)).abs().max() < 20 * torch.finfo(dtype).eps
    assert len(calls) < 30
    assert find_root(lambda x: x * torch.nan, points, 2.0).isnan().all()
    assert find_bound(function, 100 * points).unique().tolist() == [1.0, 4.0, 16.0]
    assert find_bound(torch.tanh, torch.tensor([0.5, 2.0, torch.nan])).tolist() == [1.0, 2**20, 2**20]


@pytest.mark.parametrize("kind", [zuko.flows.NAF, zuko.flows.UNAF])
@torch.no_grad()
def test_features_of_neural_flows_are_solved_one_after_the_other(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    flow, c = kind(4, 2, signal=3, transforms=2, randperm=True).double().eval(), normal(3, 1, 2, dtype=torch.float64)
    y = 10 * normal(5, 4, dtype=torch.float64)  # zuko answers some of these with a bound
    own = flow(c).transform.inv(y)
    monkeypatch.setattr(zuko.transforms, "bisection", exact_bisection)
    expected = flow(c).transform.inv(y)
    with jf.accelerate(flow) as handle:
        x = flow(c).transform.inv(y)
    assert set(handle.backends.values()) == {"passes"} and set(handle.passes.values()) == {4}
    assert (x - expected).abs().max() < 1e-10 < 1e-8 < (own - expected).abs().max()


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "ELU", "LeakyReLU"])
@pytest.mark.parametrize("context", [0, 2])
def test_neural_flows_of_pyro_get_an_inverse(context: int, activation: str) -> None:
    torch.manual_seed(0)
    make: Any = partial(pt.conditional_neural_autoregressive, 3, 2) if context else partial(pt.neural_autoregressive, 3)
    flow = make(activation=activation, width=4).double()
    x, c = 2 * normal(5, 3, dtype=torch.float64), normal(2, seed=1, dtype=torch.float64).requires_grad_()

    def transform(c: Tensor) -> Any:
        return flow.condition(c) if context else flow

    def invert(y: Tensor, c: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        own, y = transform(c), y.clone()  # pyro keeps the result for a tensor that it has seen
        return (x := own.inv(y)), own.log_abs_det_jacobian(x, y)

    y = (own := transform(c))(x)
    log_det = own.log_abs_det_jacobian(x, y)
    with pytest.raises(NotImplementedError):
        invert(y, c)
    with jf.accelerate(flow) as handle:
        torch.testing.assert_close(invert(y, c), (x, log_det), rtol=0, atol=1e-12)
        assert handle.backends == {"": "passes"}
        bias = (flow.nn if context else flow.arn).layers[-1].bias
        assert torch.autograd.gradcheck(invert, (y.detach().requires_grad_(), c, bias), fast_mode=True)
        y[0] = torch.nan
        result = invert(y, c)[0]
        assert result[0].isnan().all()
        torch.testing.assert_close(result[1:], x[1:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_values_near_the_ends_of_tanh_have_an_inverse_and_a_density() -> None:
    torch.manual_seed(0)
    flow = pt.neural_autoregressive(2, activation="tanh")
    flow.arn.layers[-1].bias[:32] += 6  # steep
    x = normal(1000, 2)
    y = flow.double()(x.double())
    y = y[(y.abs() < 12).all(dim=1)].float()
    results = []
    with jf.accelerate(flow):
        for dtype in (torch.float64, torch.float32):
            inverse = flow.to(dtype).inv(values := y.to(dtype))
            results.append(flow.log_abs_det_jacobian(inverse, values))
            gap = (flow.double()(inverse.double()) - y).abs().max()
            assert gap < (1e-9 if dtype == torch.float64 else 0.01)
    assert (results[1] - results[0]).abs().max() < 0.01 and results[1].dtype == torch.float32
