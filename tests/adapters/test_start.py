"""Inverses of many rows, for which each unit is computed once, against the libraries' own and by their residuals."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import nflows.transforms as nf
import pytest
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st
from library_flows import CASES, CONTEXT, Case, normal, same_bits
from test_fixed_point import DOUBLE, gap, gradients
from torch import Tensor, nn

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 2000
OTHERS = ("zuko NAF", "zuko user's own", "nflows user's own")  # whose features are not inverted by themselves


def solved(case: Case, flow: nn.Module, y: Tensor, c: Tensor | None, tolerance: float) -> tuple[Any, set[str]]:
    """The inverse and the ways to it, the second time, when it is known whether bits are the library's."""
    with torch.no_grad(), jf.accelerate(flow, tolerance) as done:
        first = case.invert(flow, y, c)
        found = case.invert(flow, y, c)
    assert tolerance > 0 or same_bits(first, found)
    return found, set(done.ways.values())


@pytest.mark.parametrize("context", [0, CONTEXT])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("name", [name for name in CASES if name not in OTHERS])
def test_many_rows_have_the_bits_of_the_library_or_a_small_residual(
    name: str, dtype: torch.dtype, context: int
) -> None:
    case = CASES[name]
    flow, y = case.make(context, 6, dtype=dtype), normal(ROWS, 6, dtype=dtype)
    c = normal(ROWS, context, seed=1, dtype=dtype) if context else None
    with torch.no_grad():
        expected = case.invert(flow, y, c)
    found, ways = solved(case, flow, y, c, 0.0)
    assert same_bits(expected, found)
    assert ways <= {"units", "columns", "passes"}
    found, ways = solved(case, flow, y, c, 1e-6)
    assert ways == {"units"}
    for ours, its in zip(found, expected, strict=True):
        assert (ours - its).abs().quantile(0.99) < (1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_other_kinds_take_passes(name: str) -> None:
    case = CASES[name]
    flow, y = case.make(0, 6), normal(400, 6)
    with torch.no_grad():
        expected = case.invert(flow, y)
    found, ways = solved(case, flow, y, None, 0.0)
    assert same_bits(expected, found)
    assert ways == {"passes"}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(3, 9), st.integers(0, 2), st.integers(0, 99), st.sampled_from(["order", "passes", "graph", "random"])
)
def test_masks_of_any_order(d: int, context: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(d, generator=generator)
    triangle = (torch.rand(d, d, generator=generator) < 0.5).tril(-1)
    triangle[1, 0] = True
    adjacency = (triangle | torch.eye(d, dtype=torch.bool))[order][:, order]
    builds = {
        "order": lambda d, c: zuko.flows.MaskedAutoregressiveTransform(d, c, order=order),
        "passes": lambda d, c: zuko.flows.MaskedAutoregressiveTransform(d, c, passes=2, order=order),
        "graph": lambda d, c: zuko.flows.MaskedAutoregressiveTransform(d, c, adjacency=adjacency, residual=True),
        "random": lambda d, c: nf.MaskedAffineAutoregressiveTransform(
            d, 32, c or None, use_residual_blocks=False, random_mask=True
        ),
    }
    case = Case("nflows" if kind == "random" else "zuko", builds[kind], 2.0)
    flow, y = case.make(context, d, DOUBLE, seed), normal(ROWS, d, seed=seed, dtype=DOUBLE)
    c = normal(1, context, seed=1, dtype=DOUBLE).expand(ROWS, context) if context else None
    with torch.no_grad():
        expected = case.invert(flow, y, c)
    for tolerance in (0.0, 1e-8):
        found, _ = solved(case, flow, y, c, tolerance)
        assert gap(expected, found) < (1e-300 if tolerance == 0 else 1e-9)


@pytest.mark.parametrize("name", ["zuko MAF", "nflows rational", "normflows affine"])
def test_gradients_of_many_rows(name: str) -> None:
    case = CASES[name]
    flow, y = case.make(CONTEXT, 6, DOUBLE), normal(ROWS, 6, dtype=DOUBLE).requires_grad_()
    c = normal(ROWS, CONTEXT, seed=1, dtype=DOUBLE).requires_grad_()
    expected = gradients(case, flow, y, c)
    for tolerance in (0.0, 1e-9):
        with jf.accelerate(flow, tolerance) as done:
            assert gap(expected, gradients(case, flow, y, c)) < 1e-5
        assert "library" not in done.ways.values()


def test_weights_and_masks_may_change_between_inverses() -> None:
    case = CASES["nflows feed-forward"]
    flow, y = case.make(0, 6), normal(ROWS, 6)
    jf.accelerate(flow, 1e-6)
    with torch.no_grad():
        case.invert(flow, y)
        for change in ("weights", "masks", "modules"):
            if change == "weights":
                [p.mul_(0.9) for p in flow.parameters()]
            elif change == "masks":
                [layer.mask.mul_(layer.mask.roll(1, dims=1)) for layer in (flow.autoregressive_net.initial_layer,)]
            else:
                flow.autoregressive_net = copy.deepcopy(case.make(0, 6, seed=1).autoregressive_net)
            fresh = case.make(0, 6)
            fresh.autoregressive_net = flow.autoregressive_net
            assert (case.invert(flow, y)[0] - case.invert(fresh, y)[0]).abs().max() < 1e-3


@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
def test_rows_that_are_not_finite_change_no_others(tolerance: float) -> None:
    case = CASES["zuko MAF"]
    flow, y = case.make(0, 6), normal(ROWS, 6)
    y[7, 3], y[70, 0] = torch.inf, torch.nan
    with torch.no_grad():
        (expected,) = case.invert(flow, y)
    (found,), _ = solved(case, flow, y, None, tolerance)
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-300 if tolerance == 0 else 1e-3, equal_nan=True)


def test_univariate_transforms_that_differ_by_feature_are_right() -> None:
    scale = torch.arange(1.0, 7.0)

    def shifted(shift: Tensor, slope: Tensor) -> Any:
        return zuko.transforms.MonotonicAffineTransform(shift * scale, slope)

    case = Case("zuko", partial(zuko.flows.MaskedAutoregressiveTransform, univariate=shifted), 1.0)
    flow, y = case.make(0, 6), normal(ROWS, 6)
    with torch.no_grad():
        expected = case.invert(flow, y)
    assert same_bits(expected, solved(case, flow, y, None, 0.0)[0])
