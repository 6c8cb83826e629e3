"""Gradients through an accelerated inverse, against those through the library's own passes, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zuko
from library_flows import BISECTION, CASES, CONTEXT, MAIN, Additive, Carry, Case, normal, same_bits
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 12
EXACT = 1e-10  # relative to the largest entry


def weighted(x: Tensor) -> Tensor:
    return (x.sin() * normal(*x.shape, seed=9, dtype=x.dtype)).sum()


LOSSES: dict[str, Callable[[tuple[Tensor, ...]], Tensor]] = {
    "both": lambda out: sum(weighted(part) for part in out),
    "x": lambda out: weighted(out[0]),
    "log-determinant": lambda out: weighted(out[-1]),
}


def problem(name: str, features: int = FEATURES) -> tuple[Case, nn.Module, Tensor, Tensor]:
    case = CASES[name]
    features = min(features, case.features)
    y = case.inputs(4, features, dtype=torch.float64).requires_grad_()
    c = normal(4, CONTEXT, seed=1, dtype=torch.float64).requires_grad_()
    return case, case.make(CONTEXT, features, dtype=torch.float64), y, c


def gradients(case: Case, flow: nn.Module, y: Tensor, c: Tensor, loss: str = "both") -> list[Tensor | None]:
    given = [t for t in (y, c, *flow.parameters()) if t.requires_grad]
    return list(torch.autograd.grad(LOSSES[loss](case.invert(flow, y, c)), given, allow_unused=True))


def gap(expected: Any, found: Any) -> float:
    """The largest difference, of each tensor relative to its largest entry."""
    worst = 0.0
    for own, other in zip(expected, found, strict=True):
        if own is None or not own.any():
            assert other is None or not other.any()
        else:
            assert other.dtype == own.dtype
            assert own.isfinite().all()
            worst = max(worst, float((own - other).abs().max() / own.abs().max()))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_library(name: str) -> None:
    case, flow, y, c = problem(name)
    for training in (False, True):
        if training and name in ("zuko NAF", "zuko UNAF", "nflows batch norm"):
            continue  # these have tests of their own
        flow.train(training)
        values, expected = case.invert(flow, y, c), gradients(case, flow, y, c)
        with jf.accelerate(flow) as done:
            found = case.invert(flow, y, c)
            assert same_bits(values, found)
            assert [x.requires_grad for x in values] == [x.requires_grad for x in found]
            assert gap(expected, gradients(case, flow, y, c)) < (1e-8 if name in BISECTION else EXACT)
        assert done.passes


@pytest.mark.parametrize("kind", [zuko.flows.NAF, zuko.flows.UNAF], ids=lambda kind: kind.__name__)
def test_gradients_of_neural_transforms_in_training_mode(kind: Callable[..., nn.Module]) -> None:
    # zuko's loop counts the weights of the univariate networks once for each way through its passes, so its own
    # gradient in them is not that of its inverse: differences of values are the oracle. Bisection answers in steps of
    # 1e-6, which differences over 2e-3 see as 1e-3.
    torch.manual_seed(0)
    flow = kind(6, transforms=1, signal=4, network={"hidden_features": (8,)}, hidden_features=(16, 16)).double().train()
    y = flow().transform(0.5 * normal(4, 6, dtype=torch.float64)).detach()  # in the range of the bisection
    inside = [p for name, p in flow.named_parameters() if "univariate" in name]
    jf.accelerate(flow)

    def loss() -> Tensor:
        return flow().transform.inv(y).pow(2).sum()

    for parameter, gradient in zip(inside, torch.autograd.grad(loss(), inside), strict=True):
        direction = normal(*parameter.shape, seed=7, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for move in (1e-3, -2e-3):
                parameter.add_(move * direction)
                ends.append(float(loss()))
            parameter.add_(1e-3 * direction)
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float((gradient * direction).sum()), rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MAIN)
def test_gradients_to_a_tolerance(name: str, loss: str) -> None:
    # 1e4: the second derivatives of these flows times the amplification of their errors.
    problems = problem(name)
    expected = gradients(*problems, loss)
    for tolerance in (0.0, 1e-10, 1e-6):
        with jf.accelerate(problems[1], tolerance):
            assert gap(expected, gradients(*problems, loss)) < max(EXACT, 1e4 * tolerance)


@pytest.mark.parametrize("needs", ["y", "context", "parameters", "one bias", "nothing"])
@pytest.mark.parametrize("name", ["zuko MAF", "zuko NAF", "nflows affine", "nflows user's own"])
def test_gradients_in_some_of_the_inputs(name: str, needs: str) -> None:
    case, flow, y, c = problem(name)
    flow.requires_grad_(needs == "parameters")
    y.requires_grad_(needs == "y")
    c.requires_grad_(needs == "context")
    if needs == "one bias":
        next(p for n, p in flow.named_parameters() if n.endswith("bias") and "univariate" not in n).requires_grad_()
    for tolerance in (0.0, 1e-12):
        expected = None if needs == "nothing" else gradients(case, flow, y, c)
        with jf.accelerate(flow, tolerance):
            if expected is None:
                assert not any(x.requires_grad for x in case.invert(flow, y, c))
                continue
            found = gradients(case, flow, y, c)
        assert gap(expected, found) < (1e-8 if "NAF" in name else 1e-9)
        assert any(g is not None and g.any() for g in found)


@pytest.mark.parametrize(("batch", "context"), [((), (5,)), ((5,), ()), ((3, 1), (5,)), ((5,), (3, 1))])
def test_gradients_where_zuko_broadcasts(batch: tuple[int, ...], context: tuple[int, ...]) -> None:
    case, flow, *_ = problem("zuko MAF")
    y = normal(*batch, FEATURES, dtype=torch.float64).requires_grad_()
    c = normal(*context, CONTEXT, seed=1, dtype=torch.float64).requires_grad_()
    expected = gradients(case, flow, y, c)
    for tolerance in (0.0, 1e-13):
        with jf.accelerate(flow, tolerance):
            assert gap(expected, gradients(case, flow, y, c)) < 1e-9


@pytest.mark.parametrize(("coefficient", "fewest", "most"), [(0.8, 40, 42), (0.3, 10, 16)])
def test_each_row_is_iterated_to_the_tolerance(coefficient: float, fewest: int, most: int) -> None:
    # Of x_i = y_i + c x_(i-1) the gradient of the sum of x in y_j is 1 + c + c^2 + ..., with D - j terms. The first row
    # is easy and its cotangents large, the second hard and small.
    coefficients, scales = torch.tensor([[0.0], [coefficient]]).double(), torch.tensor([[1e8], [1e-8]]).double()
    flow, y, calls = Additive(40, network=Carry()), normal(2, 40, dtype=torch.float64).requires_grad_(), []
    flow.autoregressive_net.register_full_backward_hook(lambda *_: calls.append(1))
    jf.accelerate(flow, 1e-6)
    (gradient,) = torch.autograd.grad((flow.inverse(y, coefficients)[0] * scales).sum(), y)
    terms = torch.arange(40, 0, -1).double()
    expected = torch.stack([torch.ones(40).double(), (1 - coefficient**terms) / (1 - coefficient)])
    torch.testing.assert_close(gradient / scales, expected, rtol=1e-4, atol=0)
    assert fewest <= len(calls) <= most


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_a_row_that_is_not_a_number_leaves_the_gradients_of_others(tolerance: float) -> None:
    case, flow, y, c = problem("nflows affine")
    with torch.no_grad():
        y[1, 3] = torch.nan
    others = [0, 2, 3]

    def found() -> Tensor:
        return torch.autograd.grad(weighted(case.invert(flow, y, c)[0][others]), y)[0][others]

    expected = found()
    with jf.accelerate(flow, tolerance):
        assert gap([expected], [found()]) < max(EXACT, 1e4 * tolerance)


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_backward_twice_accumulates(name: str) -> None:
    case, flow, y, c = problem(name)
    copied, grads = copy.deepcopy(flow), []
    jf.accelerate(flow)
    for used in (copied, flow):
        y.grad = c.grad = None
        loss = LOSSES["both"](case.invert(used, y, c))
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([y.grad, c.grad, *(p.grad for p in used.parameters())])
    assert gap(*grads) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    case, flow, y, c = problem("nflows affine")
    expected = gradients(case, flow, y, c)
    with jf.accelerate(flow), saved_tensors_hooks(torch.clone, torch.clone):
        out = checkpoint(lambda y, c: case.invert(flow, y, c), y, c, use_reentrant=reentrant)
        LOSSES["both"](out).backward()
    assert gap(expected, [y.grad, c.grad, *(p.grad for p in flow.parameters())]) < EXACT


@pytest.mark.parametrize("at_once", [False, True])
def test_jacobians(at_once: bool) -> None:
    case, flow, y, c = problem("nflows affine", features=8)

    def jacobian() -> Tensor:
        return torch.autograd.functional.jacobian(lambda y: case.invert(flow, y, c)[0], y, vectorize=at_once)

    expected = jacobian()
    with jf.accelerate(flow):
        assert gap([expected], [jacobian()]) < EXACT


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_second_derivatives_are_refused(name: str, loss: str) -> None:
    case, flow, y, c = problem(name, features=7)
    with jf.accelerate(flow):
        value = LOSSES[loss](case.invert(flow, y, c))
        for given in (y, next(flow.parameters())):
            with pytest.raises(RuntimeError, match=r"create_graph=True: .* restore\(\) the flow"):
                torch.autograd.grad(value, given, create_graph=True)
