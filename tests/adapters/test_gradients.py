"""Gradients by native code on the flows of all libraries, against the libraries' own code in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from random import Random
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
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import jacobiflow as jf
from tests.helpers.library_flows import (
    CASES,
    LARGE,
    NATIVE,
    default_dtype,
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


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64 that require a gradient."""
    return normal(*shape, seed=seed, dtype=DOUBLE).requires_grad_()


def mean_error(expected: list[Any], result: list[Any]) -> float:
    """The mean over tensors of the mean error relative to the largest entry."""
    pairs = [(e, r) for e, r in zip(expected, result, strict=True) if e is not None and e.any()]
    return sum(float((e - r).abs().mean() / e.abs().max()) for e, r in pairs) / max(len(pairs), 1)


def check(
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


def native_gradients(threads: int, flow: nn.Module, x: Tensor, context: Tensor | None, *arguments: Any) -> Any:
    torch.set_num_threads(threads)  # PyTorch's own threads would cost time.
    with jf.accelerate(flow) as handle:
        result = gradients(flow, x, context, *arguments)
    torch.set_num_threads(1)
    assert set(handle.backends.values()) == {"native"}, handle
    inputs = [t for t in (x, context, *flow.parameters()) if t is not None and t.requires_grad]
    masks = {id(layer.weight): layer.mask.bool() for layer in masked_layers(flow)}
    for tensor, gradient in zip(inputs, result, strict=True):
        if gradient is not None:
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
            assert id(tensor) not in masks or not gradient[~masks[id(tensor)]].any()
    return result


@pytest.mark.parametrize("library", FLOWS)
def test_random_flows(library: str) -> None:
    errors = []

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.data(), st.randoms(use_true_random=True))
    def compare(data: Any, random: Random) -> None:
        torch.manual_seed(random.randrange(1000))
        features, width = random.randint(2 if library == "zuko" else 1, 12), random.choice([0, 1, 3])
        flow, domain = FLOWS[library](data.draw, features, width)
        rows, layouts = random.choice([1, 5, 40, 70, 130]), ["as it is", "transposed", "strided", "expanded"]
        x = laid_out(inputs(domain, rows, features, dtype=torch.float32), random.choice(layouts))
        c = laid_out(torch.randn(rows, width), random.choice(layouts)) if width else None
        share = random.choice([1.0, 0.5, 0.0])  # Share of the parameters that need a gradient.
        for parameter in flow.parameters():
            parameter.requires_grad_(random.random() < share)
        x.requires_grad_(share < 1 or random.random() < 0.5)
        if c is not None:
            c.requires_grad_(random.random() < 0.5)
        errors.extend(check(steep(flow), x, c, random.choice([1, 2]), random.choice(layouts)))

    compare()
    # In a few draws a row is at a kink of ReLU or a knot of a spline, where rounding decides between two gradients.
    assert all(ours <= 2 * its + 1e-3 for ours, its in errors)
    assert median(ours for ours, _ in errors) <= 2 * median(its for _, its in errors) + 2e-7


@pytest.mark.parametrize("name", LARGE)
def test_more_features_and_rows_than_fit_one_block(name: str) -> None:
    (features, hidden), slow = LARGE[name], CASES[name].is_inverse
    flow = replace(CASES[name], gain=1.0).make(2, features, DOUBLE, hidden)
    x, c = leaf(140, features), leaf(140, 2, seed=1)
    check(flow, x, c, threads=2, directions=[not slow])
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
    check(steep(flow.double()), leaf(*batch, 5), leaf(*of_context, 2, seed=1))


@pytest.mark.parametrize("name", ["nflows affine", "normflows affine", "pyro affine"])
def test_no_rows(name: str) -> None:
    check(CASES[name].make(2, 4, DOUBLE, 8), leaf(0, 4), leaf(0, 2))


def test_a_transform_that_is_twice_in_a_composition() -> None:
    of_zuko, of_nflows, of_normflows = (
        CASES[name].make(0, 4, DOUBLE, 8) for name in ("zuko NSF", "nflows affine", "normflows affine")
    )
    for flow in (
        zuko.lazy.LazyComposedTransform(*[of_zuko.transform.transforms[0]] * 2),
        nf.CompositeTransform([of_nflows, nf.ReversePermutation(4), of_nflows]),
        normflows.NormalizingFlow(None, [of_normflows] * 2),
    ):
        check(flow, leaf(9, 4))


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_finite_differences(name: str, is_inverse: bool) -> None:
    flow, x, c = CASES[name].make(2, 3, DOUBLE, 4), leaf(2, 3), leaf(2, 2, seed=1)

    def call(x: Tensor, c: Tensor, *_: Tensor) -> Any:
        return values(flow, x, c, is_inverse)

    with default_dtype(DOUBLE), jf.accelerate(flow) as handle:
        assert torch.autograd.gradcheck(call, (x, c, *flow.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (x, c), fast_mode=True)
    assert set(handle.backends.values()) == {"native"}


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_second_derivatives_and_several_cotangents_at_once(name: str, is_inverse: bool) -> None:
    flow, x, c = CASES[name].make(2, 3, DOUBLE, 8), leaf(2, 3), leaf(2, 2, seed=1)

    def loss(x: Tensor, c: Tensor) -> Any:
        return sum(part.sin().sum() for part in values(flow, x, c, is_inverse))

    def derivatives() -> list[Tensor]:
        inputs = [x, c, *flow.parameters()]
        first = torch.autograd.grad(loss(x, c), inputs, create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
        second = torch.autograd.grad(penalty, inputs, allow_unused=True)
        log_det, each = values(flow, x, c, is_inverse)[1], torch.eye(2, dtype=DOUBLE)
        at_once = torch.autograd.grad(log_det, inputs, each, is_grads_batched=True, allow_unused=True)
        hessians = [block for flag in (False, True) for row in hessian(loss, (x, c), vectorize=flag) for block in row]
        return [*second, *at_once, *hessians, *jacobian(loss, (x, c), vectorize=True)]

    with default_dtype(DOUBLE):
        expected = derivatives()
        with jf.accelerate(flow) as handle:
            assert gradient_gap(expected, derivatives()) < EXACT
    assert set(handle.backends.values()) == {"native"}


def outcome(*arguments: Any) -> Any:
    """The gradients, or the class of the error that a spline raises."""
    try:
        return gradients(*arguments)
    except AssertionError as error:
        return type(error)


@pytest.mark.parametrize("where", ["inputs", "context", "weights", "masked weights"])
@pytest.mark.parametrize("name", NATIVE)
def test_rows_that_are_not_finite(name: str, where: str) -> None:
    flow, x, c = CASES[name].make(2, 6, DOUBLE, 16), leaf(90, 6), leaf(90, 2, seed=1)
    with torch.no_grad():
        if where == "inputs":
            x[3, 2], x[70, 0], x[89, 5] = math.nan, math.inf, -math.inf
        elif where == "context":
            c[[3, 70, 89], 1] = math.nan
        else:
            layer: Any = masked_layers(flow)[-1]
            layer.weight[tuple((layer.mask == (where == "weights")).nonzero()[0])] = math.nan
    for is_inverse in (False, True):
        arguments = (flow, x, c, is_inverse, [x.detach().nan_to_num(1.0, 1.0, 1.0).tanh(), torch.ones(90).double()])
        with default_dtype(DOUBLE):
            expected = outcome(*arguments)
            with jf.accelerate(flow):
                result = outcome(*arguments)
        if isinstance(expected, type):
            assert result is expected
            continue
        masks = {id(layer.weight): layer.mask.bool() for layer in masked_layers(flow)}
        for part in (expected, result):
            for tensor, gradient in zip((x, c, *flow.parameters()), part, strict=True):
                if id(tensor) in masks:
                    gradient[~masks[id(tensor)]] = 0  # where the library has NaN
            part += [gradient[4:70] for gradient in part[:2]]  # These rows are finite.
        for original, ours in zip(expected, result, strict=True):
            if original is not None or ours is not None:
                largest = float(original.nan_to_num(0.0, 0.0, 0.0).abs().max())
                torch.testing.assert_close(ours, original, rtol=0, atol=EXACT * largest, equal_nan=True)


@pytest.mark.parametrize("name", ["zuko NSF", "nflows affine"])
def test_the_same_bits_at_each_call(name: str) -> None:
    flow, x, ones = CASES[name].make(0, 6), normal(500, 6).requires_grad_(), torch.ones(500)
    torch.set_num_threads(2)
    with jf.accelerate(flow):
        first, second = (gradients(flow, x, None, False, [x.detach(), ones]) for _ in range(2))
    torch.set_num_threads(1)
    assert same_bits(first, second)
