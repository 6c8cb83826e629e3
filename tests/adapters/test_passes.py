"""When passes end, and the gradients through them against those through the library's own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import jacobiflow as jf
from tests.helpers.library_flows import (
    CASES,
    CONTEXT,
    MASKED,
    Additive,
    Carry,
    Case,
    both,
    gradient_gap,
    normal,
    problem_of,
    same_bits,
    values,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
EXACT = 1e-10  # relative to the largest entry


def weighted(x: Tensor) -> Tensor:
    return (x.sin() * normal(*x.shape, seed=9, dtype=x.dtype)).sum()


LOSSES: dict[str, Callable[[tuple[Tensor, ...]], Tensor]] = {
    "both": lambda out: sum(weighted(part) for part in out),
    "x": lambda out: weighted(out[0]),
    "log-determinant": lambda out: weighted(out[-1]),
}


def problem(name: str, features: int = 12) -> tuple[Case, nn.Module, Tensor, Tensor]:
    case, flow, y, c = problem_of(name, DOUBLE, features)
    return case, flow, y.requires_grad_(), c.requires_grad_()


def gradients(
    case: Case, flow: nn.Module, y: Tensor, c: Tensor, losses: Iterable[str] = ("both",)
) -> list[Tensor | None]:
    arguments, outputs = [t for t in (y, c, *flow.parameters()) if t.requires_grad], case.invert(flow, y, c)
    each = (
        torch.autograd.grad(LOSSES[loss](outputs), arguments, retain_graph=True, allow_unused=True) for loss in losses
    )
    return [gradient for gradients in each for gradient in gradients]


def test_passes_end_at_the_first_that_changes_no_entry_by_more_than_the_tolerance() -> None:
    # Pass k changes the row (1, 0, ..., 0) in `Carry` by c^(k - 1), the slowest here by 0.5^7 <= 0.01.
    coefficients = [0.01, 0.3, 0.4, 0.5]
    flow, y = Additive(32, network=Carry()), torch.eye(32, dtype=DOUBLE)[:1].expand(4, 32)
    with jf.accelerate(flow, 1e-2) as handle:
        x, _ = flow.inverse(y, torch.tensor(coefficients, dtype=DOUBLE)[:, None])
    assert handle.passes == {"": 8}
    expected = [[c**i if i < 8 else 0.0 for i in range(32)] for c in coefficients]
    torch.testing.assert_close(x, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-15)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("grad", [False, True])
def test_batches_of_any_shape_strides_and_precision(grad: bool, tolerance: float) -> None:
    y, c = normal(30, 24, dtype=DOUBLE).requires_grad_(), normal(30, CONTEXT, seed=1, dtype=DOUBLE).requires_grad_()
    batches = [
        (y[0], None), (y[0], c[0]),
        (y[0], c[:7]), (y[:7], c[0]), (y[:3, None], c[:5]), (y[:5], c[:3, None]), (y[:15].view(3, 5, 24), c[:5]),
        (y[:0].view(3, 0, 24), c[0]), (y[:5, None], c[:0]), (y.float(), c),
        (y[:15].view(24, 3, 5).permute(1, 2, 0), c[0]), (y[0].expand(3, 5, 24), c[0]),
        (y[:15].view(5, 3, 24).transpose(0, 1), None), (y.view(3, 5, 48)[..., ::2], c[:10:2]),
    ]  # fmt: skip
    case, inputs = CASES["zuko MAF"], (y, c)
    for rows, context in batches:
        flow, before = case.make(0 if context is None else CONTEXT, dtype=DOUBLE), rows.clone()
        with torch.set_grad_enabled(grad):
            expected, result, *_ = both(case, flow, rows, context, tolerance)
        assert tolerance or same_bits(expected, result)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e3 * tolerance)
        assert torch.equal(rows, before)
        if grad and rows.numel() * result[0].numel():
            original, other = (
                torch.autograd.grad(x[0].sin().sum(), inputs, allow_unused=True) for x in (expected, result)
            )
            torch.testing.assert_close(other, original, rtol=0, atol=1e3 * max(tolerance, 1e-9))


@torch.no_grad()
def test_strides_and_integers_are_taken_as_pyro_takes_them() -> None:
    flow = CASES["pyro affine"].make(features=7)
    for y in (normal(7, 3).t(), normal(7, 2, 4).permute(1, 2, 0), torch.arange(35).view(5, 7) % 4):
        expected = flow._inverse(y)
        with jf.accelerate(flow, 0.0) as handle:
            assert same_bits(expected, flow._inverse(y))
        assert handle.backends == {"": "passes" if y.is_floating_point() else "library"}


@torch.no_grad()
def test_a_context_of_whole_numbers_is_taken_as_by_the_library() -> None:
    flow, context, y = zuko.flows.MAF(8, 2), torch.tensor([[1, 2], [3, 0]]), torch.linspace(-1, 1, 16).view(2, 8)
    expected = flow(context.float()).transform.inv(y)
    for tolerance in (None, 0.0):
        with jf.accelerate(flow, tolerance):
            torch.testing.assert_close(flow(context).transform.inv(y), expected)


@pytest.mark.parametrize("name", ["zuko MAF", "nflows feed-forward", "normflows affine"])
@torch.no_grad()
def test_modes_of_pytorch(name: str) -> None:
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.float16, torch.bfloat16):
        case, flow, y, c = problem_of(name)
        if isinstance(mode, torch.dtype):
            flow, y, c, mode = flow.to(mode), y.to(mode), c.to(mode), nullcontext()
        with mode:
            expected, forward = case.invert(flow, y, c), values(flow, y, c, False)
            with jf.accelerate(flow, 0.0):
                result = case.invert(flow, y, c)
            for tolerance in (None, 1e-2):
                with jf.accelerate(flow, tolerance) as handle:
                    assert [x.dtype for x in case.invert(flow, y, c)] == [x.dtype for x in expected]
                    if not isinstance(mode, torch.inference_mode):
                        assert same_bits(forward, values(flow, y, c, False))
                        assert "native" not in handle.backends.values()
        assert same_bits(expected, result)
        assert [x.is_inference() for x in result] == [x.is_inference() for x in expected]


@pytest.mark.parametrize("name", MASKED)
def test_values_and_gradients_are_those_of_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, flow, y, c = problem(name)
    losses = ("both", "x") if name == "nflows user's own" else tuple(LOSSES)  # its log-determinant is 0
    answer, expected = case.invert(flow, y, c), gradients(case, flow, y, c, losses)
    own = 1e-6 if name == "zuko NAF" else 0.0  # the tolerance of the library itself
    for tolerance, training in ((0.0, False), (0.0, not own), (1e-10, False), (1e-6, False)):
        monkeypatch.setenv("JACOBIFLOW_NATIVE", "0" if tolerance else "1")
        with jf.accelerate(flow.train(training), tolerance) as handle:
            result = case.invert(flow, y, c)
            # 3e3: amplification by the steepest flow; 1e4: its second derivatives, times that of their errors.
            for original, ours, terms in zip(answer, result, (1, 12), strict=False):  # a log-determinant is a sum of 12
                assert (ours - original).abs().max() <= terms * 3e3 * max(tolerance, own)
                assert tolerance or same_bits(ours, original)
            assert [x.requires_grad for x in answer] == [x.requires_grad for x in result]
            gap = gradient_gap(expected, gradients(case, flow, y, c, losses))
            assert gap < max(1e-8 if own else EXACT, 1e4 * tolerance)
        assert set(handle.backends.values()) == {"passes"} and handle.passes


@pytest.mark.parametrize("needs", ["y", "context", "parameters"])
def test_gradients_in_some_of_the_inputs(needs: str) -> None:
    case, flow, y, c = problem("zuko MAF")
    flow.requires_grad_(needs == "parameters")
    y.requires_grad_(needs == "y")
    c.requires_grad_(needs == "context")
    expected = gradients(case, flow, y, c)
    with jf.accelerate(flow, 0.0):
        assert gradient_gap(expected, gradients(case, flow, y, c)) < EXACT


@pytest.mark.parametrize(("coefficient", "fewest", "most"), [(0.8, 40, 42), (0.3, 10, 16)])
def test_each_row_is_iterated_to_the_tolerance(coefficient: float, fewest: int, most: int) -> None:
    # Of x_i = y_i + c x_(i-1) the gradient of the sum of x in y_j is 1 + c + c^2 + ..., with D - j terms. The first row
    # is easy and its cotangents large, the second hard and small.
    coefficients, scales = torch.tensor([[0.0], [coefficient]]).double(), torch.tensor([[1e8], [1e-8]]).double()
    flow, y, calls = Additive(40, network=Carry()), normal(2, 40, dtype=DOUBLE).requires_grad_(), []
    flow.autoregressive_net.register_full_backward_hook(lambda *_: calls.append(1))
    jf.accelerate(flow, 1e-6)
    (gradient,) = torch.autograd.grad((flow.inverse(y, coefficients)[0] * scales).sum(), y)
    terms = torch.arange(40, 0, -1).double()
    expected = torch.stack([torch.ones(40).double(), (1 - coefficient**terms) / (1 - coefficient)])
    torch.testing.assert_close(gradient / scales, expected, rtol=1e-4, atol=0)
    assert fewest <= len(calls) <= most


def test_checkpoints_and_a_second_backward() -> None:
    case, flow, y, c = problem("nflows affine")
    expected = gradients(case, flow, y, c)
    with jf.accelerate(flow, 0.0), saved_tensors_hooks(torch.clone, torch.clone):
        LOSSES["both"](checkpoint(lambda y, c: case.invert(flow, y, c), y, c, use_reentrant=False)).backward()
        loss = LOSSES["both"](case.invert(flow, y, c))
        loss.backward(retain_graph=True)
        loss.backward()
    assert gradient_gap(expected, [t.grad / 3 for t in (y, c, *flow.parameters())]) < EXACT


@pytest.mark.parametrize("at_once", [False, True])
def test_jacobians(at_once: bool) -> None:
    case, flow, y, c = problem("nflows affine", features=8)
    jacobian = partial(torch.autograd.functional.jacobian, lambda y: case.invert(flow, y, c)[0], vectorize=at_once)
    expected = jacobian(y)
    with jf.accelerate(flow, 0.0):
        assert gradient_gap([expected], [jacobian(y)]) < EXACT


def test_second_derivatives_are_refused() -> None:
    case, flow, y, c = problem("nflows affine")
    with jf.accelerate(flow, 0.0), pytest.raises(RuntimeError, match=r"create_graph=True: .* restore\(\) the flow"):
        torch.autograd.grad(weighted(case.invert(flow, y, c)[0]), y, create_graph=True)


class Refusing(Additive):
    """A user's transform that raises an error at the first call."""

    def __init__(self, error: Exception) -> None:
        super().__init__(8)
        self.errors = [error]

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        if self.errors:
            raise self.errors.pop()
        return super()._elementwise_inverse(inputs, autoregressive_params)


def test_an_iterate_that_a_transform_refuses_ends_the_passes_and_too_little_memory_is_an_error() -> None:
    flow, y = Refusing(ValueError("an iterate")), normal(4, 8)
    with jf.accelerate(flow) as handle:
        result = flow.inverse(y)
        assert handle.backends == {"": "library"}
    assert same_bits(result, flow.inverse(y))
    for error in (MemoryError, torch.OutOfMemoryError):
        flow.errors.append(error("too little"))
        with jf.accelerate(flow), pytest.raises(error, match="too little"):
            flow.inverse(y)
