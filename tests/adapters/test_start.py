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
from library_flows import CASES, CONTEXT, Case, masked_layers, normal, outcome, same_bits
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
@pytest.mark.parametrize("where", ["input", "last feature", "context", "weights", "large"])
@pytest.mark.parametrize("name", ["zuko MAF", "zuko NSF", "nflows affine", "nflows rational", "normflows affine"])
def test_values_that_are_not_finite_are_those_of_the_library(name: str, where: str, tolerance: float) -> None:
    case = CASES[name]
    flow: Any = case.make(CONTEXT, 20)
    y, c = normal(ROWS, 20), normal(ROWS, CONTEXT, seed=1)
    if case.library == "zuko":  # a second transform would spread what the first one gives
        flow = flow.transform.transforms[0]
    with torch.no_grad():
        if where == "input":
            y[7, 3], y[70, 0] = torch.inf, torch.nan
        elif where == "last feature":
            y[7, 19] = torch.nan
        elif where == "context":
            c[7, 1] = torch.inf
        elif where == "weights":
            masked_layers(flow)[-1].weight[-1, -1] = torch.nan
        else:  # some iterates of the library overflow on the way to an answer that is finite
            y[:200, 19] = 3e38
        expected = outcome(lambda: case.invert(flow, y, c))
        with jf.accelerate(flow, tolerance):
            found = outcome(lambda: case.invert(flow, y, c))
    if tolerance == 0 or isinstance(expected, type):
        assert found is expected or same_bits(expected, found)
    else:
        for own, other in zip(expected, found, strict=True):
            assert torch.equal(own.isfinite(), other.isfinite())
            assert own.isclose(other, rtol=1e-3, atol=1e-3, equal_nan=True).double().mean() > 0.99


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "meta")])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine", "normflows affine"])
def test_default_types_and_devices_change_nothing(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    flow, other = case.make(CONTEXT, 6), case.make(CONTEXT, 6)
    y, c = normal(ROWS, 6), normal(ROWS, CONTEXT, seed=1)
    expected = solved(case, flow, y, c, 1e-6)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            found = solved(case, other, y, c, 1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(expected[0], found[0])
    assert expected[1] == found[1] == {"units"}


class Static(nf.MaskedAffineAutoregressiveTransform):
    """A user's transform whose elementwise inverse is a function."""

    @staticmethod
    def _elementwise_inverse(inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs - autoregressive_params[:, ::2], inputs.new_zeros(len(inputs))


@pytest.mark.parametrize("how", ["static", "replaced"])
def test_elementwise_inverses_of_the_user(how: str) -> None:
    torch.manual_seed(0)
    flow: Any = (Static if how == "static" else nf.MaskedAffineAutoregressiveTransform)(6, 32)
    if how == "replaced":
        flow._elementwise_inverse = Static._elementwise_inverse
    case, y = CASES["nflows affine"], normal(ROWS, 6)
    with torch.no_grad():
        expected = case.invert(flow, y)
    assert same_bits(expected, solved(case, flow, y, None, 0.0)[0])


def test_errors_that_no_spline_raises_are_those_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    case = CASES["nflows affine"]
    flow = case.make(0, 6)
    monkeypatch.setattr("jacobiflow.adapters.once.torch.addmm", fail)
    with pytest.raises(torch.OutOfMemoryError):
        solved(case, flow, normal(ROWS, 6), None, 1e-6)


def test_univariate_transforms_that_differ_by_feature_are_right() -> None:
    scale = torch.arange(1.0, 7.0)

    def shifted(shift: Tensor, slope: Tensor) -> Any:
        return zuko.transforms.MonotonicAffineTransform(shift * scale, slope)

    case = Case("zuko", partial(zuko.flows.MaskedAutoregressiveTransform, univariate=shifted), 1.0)
    flow, y = case.make(0, 6), normal(ROWS, 6)
    with torch.no_grad():
        expected = case.invert(flow, y)
    assert same_bits(expected, solved(case, flow, y, None, 0.0)[0])
