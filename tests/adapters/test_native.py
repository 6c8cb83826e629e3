"""Values and gradients by native code on the flows of all libraries, against the libraries' own code in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
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

import jacobiflow as jf
from tests.helpers.library_flows import (
    CASES,
    LARGE,
    check,
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


def native_gradients(threads: int, flow: nn.Module, x: Tensor, context: Tensor | None, *arguments: Any) -> Any:
    torch.set_num_threads(threads)  # PyTorch's own threads would cost time.
    with jf.accelerate(flow) as handle:
        result = gradients(flow, x, context, *arguments)
    torch.set_num_threads(1)
    assert set(handle.backends.values()) == {"native"}, handle
    needing = [t for t in (x, context, *flow.parameters()) if t is not None and t.requires_grad]
    masks = {id(layer.weight): layer.mask.bool() for layer in masked_layers(flow)}
    for tensor, gradient in zip(needing, result, strict=True):
        if gradient is not None:
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
            assert id(tensor) not in masks or not gradient[~masks[id(tensor)]].any()
    return result


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
        x.requires_grad_(share < 1 or draw(st.booleans()))
        if c is not None:
            c.requires_grad_(draw(st.booleans()))
        errors.extend(check_gradients(flow, x, c, threads, draw(layout)))

    compare()
    # In a few draws a row is at a kink of ReLU or a knot of a spline, where rounding decides between two gradients.
    assert all(ours <= 2 * its + 1e-3 for ours, its in errors)
    assert median(ours for ours, _ in errors) <= 2 * median(its for _, its in errors) + 2e-7


DTYPES = [torch.float32, DOUBLE]
BOTH_DTYPES = [
    pytest.param(name, DTYPES[(i + j) % 2], marks=[pytest.mark.slow] * j)
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


@torch.no_grad()
def test_coupling_forms_of_masked_transforms() -> None:
    for kind in (zuko.flows.MAF, zuko.flows.NSF):
        check(steep(kind(6, 3, passes=2)).transform, normal(5, 6), normal(5, 3))


@pytest.mark.parametrize("name", ["zuko NSF", "nflows affine"])
def test_the_same_bits_at_each_call(name: str) -> None:
    flow, x, ones = CASES[name].make(0, 6), normal(500, 6).requires_grad_(), torch.ones(500)
    torch.set_num_threads(2)
    with jf.accelerate(flow):
        first, second = (gradients(flow, x, None, False, [x.detach(), ones]) for _ in range(2))
    torch.set_num_threads(1)
    assert same_bits(first, second)
