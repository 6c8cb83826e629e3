"""Roots of monotone functions."""

from __future__ import annotations

import pytest
import torch
import zuko
from torch import Tensor

import jacobiflow as jf
from jacobiflow.adapters.root import find_root
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
