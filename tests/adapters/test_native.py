"""Values and gradients by native code on the flows of all libraries, against the libraries' own code in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from statistics import median
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
from torch import Tensor, nn
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.polynomial import ShiftedSOSPTransform

import jacobiflow as jf
from tests.helpers.library_flows import (
    BISECTED,
    CASES,
    LARGE,
    NATIVE,
    check,
    default_dtype,
    exact,
    exact_bisection,
    gradient_gap,
    gradients,
    laid_out,
    masked_layers,
    normal,
    same_bits,
    steep,
    values,
)
from tests.helpers.random_flows import FLOWS, inputs

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

DOUBLE = torch.float64
EXACT = 1e-9  # relative to the largest entry
BAD, ALL = [3, 70, 149], list(range(150))  # rows, in different tiles of native code


@pytest.fixture(autouse=True)
def bisect_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zuko.transforms, "bisection", exact_bisection)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64 that require a gradient."""
    return normal(*shape, seed=seed, dtype=DOUBLE).requires_grad_()


def mean_error(expected: list[Any], result: list[Any]) -> float:
    """The mean over tensors of the mean error relative to the largest entry."""
    pairs = [(e, r) for e, r in zip(expected, result, strict=True) if e is not None and e.any()]
    return sum(float((e - r).abs().mean() / e.abs().max()) for e, r in pairs) / max(len(pairs), 1)


def check_gradients(
    flow: nn.Module, x: Tensor, context: Tensor | None = None, threads: int = 1, layout: str = "as it is",
    directions: Iterable[bool] = (False, True),
) -> list[tuple[float, float]]:  # fmt: skip
    """Compares float64 with the library's; returns the mean errors of float32, by native code and by the library.

    `layout` is that of the cotangents, and `directions` say whether to invert.
    """
    double, errors = copy.deepcopy(flow).double(), []
    doubles = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, context)]
    for is_inverse in directions:
        with default_dtype(DOUBLE):
            shapes = [part.shape for part in values(double, *doubles, is_inverse)]
            cotangents = [laid_out(torch.randn(shape, dtype=x.dtype), layout) for shape in shapes]
            in_double = [laid_out(part.double(), layout) for part in cotangents]
            expected = gradients(double, *doubles, is_inverse, in_double)
            result = native_gradients(threads, double, *doubles, is_inverse, in_double)
        assert gradient_gap(expected, result) < EXACT
        if x.dtype == torch.float32:
            original = gradients(flow, x, context, is_inverse, cotangents)
            result = native_gradients(threads, flow, x, context, is_inverse, cotangents)
            errors.append((mean_error(expected, result), mean_error(expected, original)))
    return errors


def masks_of(flow: nn.Module) -> dict[int, Tensor]:
    """The masks of weights by their ids."""
    layers: list[Any] = [layer for layer in masked_layers(flow) if hasattr(layer, "mask")]
    return {id(layer.weight): layer.mask.bool() for layer in layers}


def native_gradients(threads: int, flow: nn.Module, x: Tensor, context: Tensor | None, *arguments: Any) -> Any:
    torch.set_num_threads(threads)  # PyTorch's own threads would cost time.
    with jf.accelerate(flow) as handle:
        result = gradients(flow, x, context, *arguments)
    torch.set_num_threads(1)
    assert set(handle.backends.values()) == {"native"}, handle
    needing = [t for t in (x, context, *flow.parameters()) if t is not None and t.requires_grad]
    masks = masks_of(flow)
    for tensor, gradient in zip(needing, result, strict=True):
        if gradient is not None:
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
            assert id(tensor) not in masks or not gradient[~masks[id(tensor)]].any()
    return result


@pytest.mark.hypothesis
@pytest.mark.parametrize("library", FLOWS)
def test_random_flows(library: str) -> None:
    errors: list[tuple[float, float]] = []

    @settings(max_examples=settings.default.max_examples // 3)
    @given(st.data())
    def compare(data: Any) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 999)))
        features, width = draw(st.integers(2 if library == "zuko" else 1, 12)), draw(st.sampled_from([0, 1, 3]))
        flow, domain = FLOWS[library](draw, features, width)
        rows, dtype = draw(st.sampled_from([1, 5, 40, 70, 130])), draw(st.sampled_from([torch.float32, DOUBLE]))
        layout = st.sampled_from(["as it is", "transposed", "strided", "expanded"])
        x = laid_out(inputs(domain, rows, features, dtype=dtype), draw(layout))
        c = laid_out(torch.randn(rows, width, dtype=dtype), draw(layout)) if width else None
        flow, threads = steep(flow.to(dtype)), draw(st.integers(1, 2))
        check(flow, x, c, domain, threads)
        share = draw(st.sampled_from([1.0, 0.5, 0.0]))  # Share of the parameters that need a gradient.
        for parameter in flow.parameters():
            parameter.requires_grad_(bool(torch.rand(()) < share))
        parameter.requires_grad_()  # Or the log-determinant of one feature may depend on nothing.
        x.requires_grad_(share < 1 or draw(st.booleans()))
        if c is not None:
            c.requires_grad_(draw(st.booleans()))
        errors.extend(check_gradients(flow, x, c, threads, draw(layout)))

    compare()
    # In a few draws a row is at a kink of ReLU or a knot of a spline, where rounding decides between two gradients.
    assert all(ours <= 2 * its + 1e-3 for ours, its in errors)
    assert median(ours for ours, _ in errors) <= 2 * median(its for _, its in errors) + 5e-6  # of few draws


BOTH_DTYPES = [
    pytest.param(name, (torch.float32, DOUBLE)[(i + j) % 2], marks=[pytest.mark.slow] * j)
    for i, name in enumerate(LARGE)
    for j in (0, 1)
]


@pytest.mark.parametrize(("name", "dtype"), BOTH_DTYPES)
def test_values_of_more_features_and_rows_than_fit_one_block(name: str, dtype: torch.dtype) -> None:
    features, hidden = LARGE[name]
    flow = CASES[name].make(2, features, dtype, hidden)
    check(flow, normal(140, features, dtype=dtype), normal(140, 2, seed=1, dtype=dtype), threads=2)


@pytest.mark.parametrize("name", LARGE)
def test_gradients_of_more_features_and_rows_than_fit_one_block(name: str) -> None:
    (features, hidden), slow = LARGE[name], CASES[name].is_inverse
    flow = replace(CASES[name], gain=1.0).make(2, features, DOUBLE, hidden)
    x, c = leaf(140, features), leaf(140, 2, seed=1)
    check_gradients(flow, x, c, threads=2, directions=[not slow])
    # The library needs a minute for the slow side. It is the inverse of the fast side, so their gradients cancel.
    cotangents = [normal(140, features, seed=2, dtype=DOUBLE), normal(140, seed=3, dtype=DOUBLE)]
    with jf.accelerate(flow):
        results = values(flow, x, c, not slow)
        y = results[0].detach().requires_grad_()
        of_y, *of_slow = gradients(flow, y, c, slow, cotangents)
        needs_gradient = [x, c, *flow.parameters()]
        of_fast = torch.autograd.grad(results, needs_gradient, [of_y, cotangents[1]], allow_unused=True)
    negative = [None if gradient is None else -gradient for gradient in of_slow]
    assert gradient_gap([cotangents[0], *of_fast[1:]], [of_fast[0], *negative]) < EXACT


@pytest.mark.parametrize(("batch", "of_context"), [((), ()), ((7,), ()), ((3, 1), (2,)), ((2, 1, 3), (2, 4, 3))])
@pytest.mark.parametrize("library", ["zuko", "pyro"])
def test_batches_of_any_shape(library: str, batch: tuple[int, ...], of_context: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch = torch.broadcast_shapes(batch, of_context)  # The libraries' forward directions need whole batches.
    flow = zuko.flows.NSF(5, 2) if library == "zuko" else pt.conditional_affine_autoregressive(5, 2, [16])
    x, context = leaf(*batch, 5), leaf(*of_context, 2, seed=1)
    check(steep(flow.double()), x, context)
    check_gradients(flow, x, context)


@pytest.mark.parametrize("name", ["nflows affine", "normflows affine", "pyro affine"])
def test_no_rows(name: str) -> None:
    check_gradients(CASES[name].make(2, 4, DOUBLE, 8), leaf(0, 4), leaf(0, 2))


def test_a_transform_that_is_twice_in_a_composition() -> None:
    of_zuko, of_nflows, of_normflows = (
        CASES[name].make(0, 4, DOUBLE, 8) for name in ("zuko NSF", "nflows affine", "normflows affine")
    )
    for flow in (
        zuko.lazy.LazyComposedTransform(*[of_zuko.transform.transforms[0]] * 2),
        nf.CompositeTransform([of_nflows, nf.ReversePermutation(4), of_nflows]),
        normflows.NormalizingFlow(None, [of_normflows] * 2),
    ):
        check_gradients(flow, leaf(9, 4))


@pytest.mark.parametrize("name", ["zuko NSF", "nflows affine"])
def test_the_same_bits_at_each_call(name: str) -> None:
    flow, x, ones = CASES[name].make(0, 6), normal(500, 6).requires_grad_(), torch.ones(500)
    torch.set_num_threads(2)
    with jf.accelerate(flow):
        first, second = (gradients(flow, x, None, False, [x.detach(), ones]) for _ in range(2))
    torch.set_num_threads(1)
    assert same_bits(first, second)


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


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_numbers_at_and_beyond_the_bounds_of_polynomials(bound: float) -> None:
    torch.manual_seed(0)
    univariate = partial(zuko.transforms.BoundedBernsteinTransform, bound=bound)
    bernstein = MaskedAutoregressiveTransform(2, univariate=univariate, shapes=[(5,)]).double()
    margins = bound * (1 + torch.tensor([-3e-6, -1e-6, 0.0, 1e-6, 1.0], dtype=DOUBLE))
    check(bernstein, torch.cat([margins, -margins])[:, None].expand(-1, 2), None)
    check_gradients(bernstein, 2 * bound * leaf(50, 2))
    squares = zuko.flows.SOSPF(2).double()
    y = 1000 * leaf(50, 2)  # whose inverses zuko searches in [-10, 10]
    check(squares, y, None)
    check_gradients(squares, y, directions=[True])


@pytest.mark.parametrize("name", BISECTED)
@torch.no_grad()
def test_inverses_that_zuko_bisects_are_solved_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    flow, y = CASES[name].make(0, 6, DOUBLE), normal(100, 6, dtype=DOUBLE)
    own = flow().transform.inv(y)
    with jf.accelerate(flow):
        ours = flow().transform.inv(y)
    errors = [float((flow().transform(x) - y).abs().max()) for x in (ours, own)]
    assert errors[0] < 1e-12 < 1e-8 < errors[1]
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("univariate", "shapes", "reason"),
    [
        (zuko.transforms.BernsteinTransform, [(5,)], "the univariate BernsteinTransform"),
        (zuko.transforms.BoundedBernsteinTransform, [(1,)], "parameters of other sizes"),
        (zuko.transforms.BoundedBernsteinTransform, [(200,)], "parameters of other sizes"),
        (partial(ShiftedSOSPTransform, slope=torch.ones(())), [(2, 3), ()], "the settings of ShiftedSOSPTransform"),
        (ShiftedSOSPTransform, [(6,), ()], "the univariate ShiftedSOSPTransform"),
    ],
)
def test_other_polynomials_are_left_to_zuko(univariate: Any, shapes: Any, reason: str) -> None:
    flow = MaskedAutoregressiveTransform(6, univariate=univariate, shapes=shapes)
    assert reason in str(jf.accelerate(flow))


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
        mask = getattr(layer, "mask", torch.full_like(layer.weight, where == "weights"))
        layer.weight[tuple((mask == (where == "weights")).nonzero()[0])] = math.nan
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
    if where == "masked weights" and name in BISECTED:
        pytest.skip("zuko's bisection answers NaN with a number, at which passes have the gradients of other biases")
    tensors = [x.requires_grad_(), c.requires_grad_(), *flow.parameters()]
    masks = masks_of(flow)
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
            some = [slice(4, 70)] if len(original) > 4 else []  # finite if they are rows of x and the context
            for rows in (slice(None), *some):
                size = float(original[rows].nan_to_num(0.0, 0.0, 0.0).abs().max())
                torch.testing.assert_close(ours[rows], original[rows], rtol=0, atol=1e-9 * size, equal_nan=True)
