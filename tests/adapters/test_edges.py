"""Rows that are not finite, and inputs at the edges of splines, against the libraries' own code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nflows.transforms as nf
import pytest
import torch
import zuko
from nflows.transforms.base import InputOutsideDomain
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.library_flows import (
    CASES,
    NATIVE,
    default_dtype,
    exact,
    gradients,
    masked_layers,
    normal,
    same_bits,
    values,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

BAD, ALL = [3, 70, 149], list(range(150))  # rows, in different tiles of native code


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


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or the class of the error that a spline raises."""
    try:
        return call(*arguments)
    except AssertionError as error:
        return type(error)


@torch.no_grad()
def spoil(flow: nn.Module, x: Tensor, c: Tensor, where: str) -> list[int]:
    """Writes numbers that are not finite, or overflow on the way; returns the rows that depend on them."""
    if where == "inputs":
        x[3, 2], x[70, 0], x[149, 5] = math.nan, math.inf, -math.inf
    elif where == "large inputs":
        x[BAD] *= 3e38
    elif where == "context":
        c[BAD, 1] = math.nan
    else:
        layer: Any = masked_layers(flow)[-1]
        layer.weight[tuple((layer.mask == (where == "weights")).nonzero()[0])] = math.nan
        return ALL
    return BAD


@pytest.mark.parametrize("where", ["inputs", "large inputs", "context", "weights", "masked weights"])
@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_rows_that_are_not_finite_are_the_library_s(name: str, where: str) -> None:
    flow, x, c = CASES[name].make(2, 6), normal(150, 6), normal(150, 2, seed=1)
    with jf.accelerate(flow):
        before = [values(flow, x, c, is_inverse) for is_inverse in (False, True)]
    bad = spoil(flow, x, c, where)
    others = [row for row in ALL if row not in bad]
    for is_inverse in (False, True):
        expected, whole = (outcome(values, flow, x[rows], c[rows], is_inverse) for rows in (bad, ALL))
        with jf.accelerate(flow):
            result = outcome(values, flow, x, c, is_inverse)
        with jf.accelerate(flow, 0.0):
            bits = outcome(values, flow, x, c, is_inverse)
            assert bits is whole or same_bits(bits, whole)
        if isinstance(expected, type):
            assert result is expected
            continue
        for ours, its, original in zip(result, expected, before[is_inverse], strict=True):
            torch.testing.assert_close(ours[bad], its, rtol=1e-4, atol=1e-4, equal_nan=True)
            assert same_bits(ours[others], original[others])


@pytest.mark.parametrize("where", ["inputs", "context", "weights", "masked weights"])
@pytest.mark.parametrize("name", NATIVE)
@default_dtype(torch.float64)
def test_gradients_with_rows_that_are_not_finite(name: str, where: str) -> None:
    flow, x, c = (
        CASES[name].make(2, 6, torch.float64, 16), *(normal(150, size, dtype=torch.float64) for size in (6, 2))
    )  # fmt: skip
    spoil(flow, x, c, where)
    tensors = [x.requires_grad_(), c.requires_grad_(), *flow.parameters()]
    masks = {id(layer.weight): layer.mask.bool() for layer in masked_layers(flow)}
    for is_inverse in (False, True):
        cotangents = [x.detach().nan_to_num(1.0, 1.0, 1.0).tanh(), torch.ones(150)]
        expected = outcome(gradients, flow, x, c, is_inverse, cotangents)
        with jf.accelerate(flow):
            result = outcome(gradients, flow, x, c, is_inverse, cotangents)
        if isinstance(expected, type):
            assert result is expected
            continue
        for tensor, original, ours in zip(tensors, expected, result, strict=True):
            if original is None:
                assert ours is None or not ours.any()
                continue
            if id(tensor) in masks:  # where the library has NaN
                original, ours = original[masks[id(tensor)]], ours[masks[id(tensor)]]
            for rows in (slice(None), slice(4, 70)):  # The latter are finite if they are rows of x and the context.
                size = float(original[rows].nan_to_num(0.0, 0.0, 0.0).abs().max())
                torch.testing.assert_close(ours[rows], original[rows], rtol=0, atol=1e-9 * size, equal_nan=True)
