"""Native code on the flows of all libraries, against the libraries' own code in float64."""

from __future__ import annotations

import math
from typing import Any

import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.transforms.base import InputOutsideDomain
from torch import Tensor

import jacobiflow as jf
from tests.helpers.library_flows import (
    CASES,
    LARGE,
    NATIVE,
    check,
    exact,
    laid_out,
    masked_layers,
    normal,
    same_bits,
    steep,
    values,
)
from tests.helpers.random_flows import FLOWS, inputs

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

ROWS = [1, 5, 40, 70, 130]


@pytest.mark.parametrize("library", FLOWS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
@torch.no_grad()
def test_random_flows(library: str, data: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    features, context = draw(st.integers(2 if library == "zuko" else 1, 12)), draw(st.sampled_from([0, 0, 1, 3]))
    flow, domain = FLOWS[library](draw, features, context)
    dtype, rows = draw(st.sampled_from([torch.float32, torch.float32, torch.float64])), draw(st.sampled_from(ROWS))
    layout = st.sampled_from(["as they are", "as they are", "transposed", "strided", "expanded"])
    x = laid_out(inputs(domain, rows, features, dtype=dtype), draw(layout))
    c = laid_out(torch.randn(rows, context, dtype=dtype), draw(layout)) if context else None
    check(steep(flow.to(dtype)), x, c, domain, threads=draw(st.integers(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LARGE)
@torch.no_grad()
def test_more_features_and_rows_than_fit_one_block(name: str, dtype: torch.dtype) -> None:
    features, hidden = LARGE[name]
    flow = CASES[name].make(2, features, dtype, hidden)
    check(flow, normal(140, features, dtype=dtype), normal(140, 2, seed=1, dtype=dtype), threads=2)


@pytest.mark.parametrize(("batch", "of_context"), [((), ()), ((7,), ()), ((3, 1), (2,)), ((2, 1, 3), (2, 4, 3))])
@pytest.mark.parametrize("library", ["zuko", "pyro"])
@torch.no_grad()
def test_batches_of_any_shape(library: str, batch: tuple[int, ...], of_context: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch = torch.broadcast_shapes(batch, of_context)  # The libraries' forward directions need whole batches.
    flow = zuko.flows.MAF(5, 2) if library == "zuko" else pt.conditional_affine_autoregressive(5, 2, [16])
    check(steep(flow.double()), inputs("line", *batch, 5, dtype=torch.float64), torch.randn(*of_context, 2).double())


@pytest.mark.parametrize("tolerance", [None, 0.0])
@pytest.mark.parametrize("kind", [zuko.flows.MAF, zuko.flows.NSF, zuko.flows.NCSF, "inverse", "mixed"])
@torch.no_grad()
def test_distributions_of_zuko(kind: Any, tolerance: float | None) -> None:
    torch.manual_seed(0)
    flow = steep((zuko.flows.MAF if isinstance(kind, str) else kind)(4, 2).double())
    if kind == "inverse":  # its slow side is the density
        flow = zuko.lazy.Flow([part.inv for part in flow.transform.transforms], flow.base)
    if kind == "mixed":  # native code does not take the last transform
        last = zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=9.0)
        flow = zuko.lazy.Flow([*flow.transform.transforms, last], flow.base)
    x, c = torch.rand(6, 4).double(), torch.randn(6, 2).double()

    def calls() -> list[Tensor]:
        torch.manual_seed(5)
        result = [
            flow(c).log_prob(x),
            flow(c).sample((3,)),
            flow(c).sample((0,)),
            *flow(c[0]).rsample_and_log_prob((3, 2)),
        ]
        return [*result, torch.get_rng_state()]

    expected = calls()
    with jf.accelerate(flow, tolerance) as handle:
        result = calls()
    assert tolerance is None or same_bits(expected, result)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert tolerance == 0 or set(handle.backends.values()) == {"native"}


@torch.no_grad()
def test_the_flows_of_normflows_sample_and_score() -> None:
    torch.manual_seed(0)
    parts = [normflows.flows.MaskedAffineAutoregressive(4, 16), normflows.flows.Permute(4)]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), parts).double()
    x = torch.randn(6, 4).double()

    def calls() -> list[Tensor]:
        torch.manual_seed(5)
        return [flow(x), flow.inverse(x), flow.log_prob(x), *flow.sample(3)]

    expected = calls()
    for tolerance in (None, 0.0):
        with jf.accelerate(flow, tolerance):
            result = calls()
        assert tolerance is None or same_bits(expected, result)
        for original, other in zip(expected, result, strict=True):
            torch.testing.assert_close(other, original, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_inputs_outside_of_a_spline() -> None:
    torch.manual_seed(0)
    unit = nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 16)
    circle = zuko.flows.NCSF(4).transform.transforms[0].eval()
    inside, outside = torch.rand(40, 4), torch.rand(40, 4)
    outside[7, 2] = 5.0
    with jf.accelerate(unit):
        for call in (unit.inverse, unit.forward):
            call(inside)
            with pytest.raises(InputOutsideDomain):
                call(outside)
    for is_inverse in (False, True):
        expected = values(circle, outside, None, is_inverse)
        with jf.accelerate(circle):
            for original, other in zip(expected, values(circle, outside, None, is_inverse), strict=True):
                torch.testing.assert_close(other, original, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_steep_splines_are_finite_at_their_knots() -> None:
    # Next to them rounding may make the discriminant negative, at which nflows raises an error.
    torch.manual_seed(0)
    flow = nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(100, 16, num_bins=3, tails="linear", tail_bound=3)
    heights, last = torch.randn(100, 3), flow.autoregressive_net.final_layer
    last.weight.zero_()
    widths, slopes = torch.tensor([-48.0, 44.0, -68.0]).expand(100, 3), torch.full((100, 2), -11.0)
    last.bias.copy_(torch.cat([widths, 4 * heights, slopes], dim=1).flatten())
    knots = 6 * (1e-3 + (1 - 3e-3) * heights.softmax(1)[:, 0]) - 3
    y = knots * (1 + 6e-8 * torch.arange(-20, 20)[:, None])
    with jf.accelerate(flow):
        result = flow.inverse(y)[0]
    assert (result - exact(flow, y, None, is_inverse=True)[0]).abs().max() < 1e-4


def outcome(*arguments: Any) -> Any:
    """The values, or the class of the error that a spline raises."""
    try:
        return values(*arguments)
    except AssertionError as error:
        return type(error)


@pytest.mark.parametrize("where", ["inputs", "large inputs", "context", "weights", "masked weights"])
@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_rows_that_are_not_finite_are_the_library_s(name: str, where: str) -> None:
    flow = CASES[name].make(2, 6)
    x, c, bad = normal(150, 6), normal(150, 2, seed=1), [3, 70, 149]
    with jf.accelerate(flow):
        before = [values(flow, x, c, is_inverse) for is_inverse in (False, True)]
    if where == "inputs":
        x[3, 2], x[70, 0], x[149, 5] = math.nan, math.inf, -math.inf
    elif where == "large inputs":
        x[bad] *= 3e38
    elif where == "context":
        c[bad, 1] = math.nan
    else:
        layer: Any = masked_layers(flow)[-1]
        position = (layer.mask == (where == "weights")).nonzero()[0]
        layer.weight[tuple(position)], bad = math.nan, list(range(150))
    others = [row for row in range(150) if row not in bad]
    for is_inverse in (False, True):
        expected, whole = outcome(flow, x[bad], c[bad], is_inverse), outcome(flow, x, c, is_inverse)
        with jf.accelerate(flow):
            result = outcome(flow, x, c, is_inverse)
        with jf.accelerate(flow, 0.0):
            bits = outcome(flow, x, c, is_inverse)
            assert bits is whole or same_bits(bits, whole)
        if isinstance(expected, type):
            assert result is expected
            continue
        for ours, its, original in zip(result, expected, before[is_inverse], strict=True):
            torch.testing.assert_close(ours[bad], its, rtol=1e-4, atol=1e-4, equal_nan=True)
            assert same_bits(ours[others], original[others])
