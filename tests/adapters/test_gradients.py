"""Gradients through an accelerated inverse, against those through the library's own passes, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import normflows
import pytest
import torch
import zuko
from library_flows import CASES, MAIN, WITHOUT_CONTEXT, Additive, Case, Chain, counted, harder, normal, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 2
FEATURES = 12
EXACT = 1e-10  # relative to the largest entry
BISECTION = ("SOSPF", "BPF", "NAF")


def weights(like: Tensor) -> Tensor:
    """Fixed cotangents of an output, none of them 1."""
    return normal(*like.shape, seed=9, dtype=like.dtype)


LOSSES: dict[str, Callable[[tuple[Tensor, ...]], Tensor]] = {
    "x": lambda out: (out[0] * weights(out[0])).sum(),
    "x squared": lambda out: out[0].pow(2).sum(),
    "log-determinant": lambda out: (out[-1] * weights(out[-1])).sum(),
    "both": lambda out: sum((part.sin() * weights(part)).sum() for part in out),
}


def problem(name: str, features: int = FEATURES) -> tuple[Case, nn.Module, Tensor, Tensor | None]:
    case = CASES[name]
    context = 0 if name in WITHOUT_CONTEXT else CONTEXT
    features = min(features, case.features)
    y = case.inputs(4, features, dtype=torch.float64).requires_grad_()
    c = normal(4, context, seed=1, dtype=torch.float64).requires_grad_() if context else None
    return case, case.make(context, features, dtype=torch.float64), y, c


def gradients(case: Case, flow: nn.Module, y: Tensor, c: Tensor | None, loss: str) -> list[Tensor | None]:
    given = [t for t in (y, c, *flow.parameters()) if t is not None and t.requires_grad]
    value = LOSSES[loss](case.invert(flow, y, c))
    return list(torch.autograd.grad(value, given, allow_unused=True))


def gap(expected: list[Tensor | None], found: list[Tensor | None]) -> float:
    """The largest difference, of each tensor relative to its largest entry."""
    worst = 0.0
    for own, other in zip(expected, found, strict=True):
        if own is None or not own.any():
            assert other is None or not other.any()
        else:
            assert other is not None
            assert other.dtype == own.dtype
            assert own.isfinite().all()
            worst = max(worst, float((own - other).abs().max() / own.abs().max()))
    return worst


# ---------------------------------------------------------------------------------------------- against the library's


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_library(name: str, training: bool) -> None:
    if training and ("NAF" in name or "batch norm" in name):
        pytest.skip("has tests of its own")
    case, flow, y, c = problem(name)
    flow.train(training)
    loss = "both"
    expected = gradients(case, flow, y, c, loss)
    with jf.accelerate(flow) as done:
        found = gradients(case, flow, y, c, loss)
    assert gap(expected, found) < (1e-8 if any(kind in name for kind in BISECTION) else EXACT)
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
    assert inside
    jf.accelerate(flow)

    def loss() -> Tensor:
        return flow().transform.inv(y).pow(2).sum()

    found = torch.autograd.grad(loss(), inside)
    for parameter, gradient in zip(inside, found, strict=True):
        direction = normal(*parameter.shape, seed=7, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for move in (1e-3, -2e-3):
                parameter.add_(move * direction)
                ends.append(float(loss()))
            parameter.add_(1e-3 * direction)
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float((gradient * direction).sum()), rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["nflows affine", "nflows rational tails", "nflows affine batch norm",
                                  "normflows affine", "normflows spline"])  # fmt: skip
def test_gradients_of_log_determinants(name: str, loss: str) -> None:
    case, flow, y, c = problem(name)
    expected = gradients(case, flow, y, c, loss)
    with jf.accelerate(flow):
        assert gap(expected, gradients(case, flow, y, c, loss)) < EXACT


def test_a_log_determinant_without_a_graph() -> None:
    # Of y = x + shift it is 0, which nflows gives no gradient; it may still be in a loss.
    flow = harder(Additive(FEATURES), 2.0).double()
    y = normal(4, FEATURES, dtype=torch.float64).requires_grad_()

    def found() -> list[Any]:
        x, logabsdet = flow.inverse(y)
        loss = x.pow(2).sum() + logabsdet.sum()
        return [logabsdet.requires_grad, *torch.autograd.grad(loss, [y, *flow.parameters()])]

    expected = found()
    with jf.accelerate(flow):
        accelerated = found()
    assert gap(expected[1:], accelerated[1:]) < EXACT


@pytest.mark.parametrize("tolerance", [1e-10, 1e-6])
@pytest.mark.parametrize("name", MAIN)
def test_above_0_gradients_are_near(name: str, tolerance: float) -> None:
    # 1e4: the second derivatives of these flows times the amplification of their errors.
    case, flow, y, c = problem(name)
    expected = gradients(case, flow, y, c, "both")
    with jf.accelerate(flow, tolerance):
        assert gap(expected, gradients(case, flow, y, c, "both")) < 1e4 * tolerance


@pytest.mark.parametrize("tolerance", [0.0, 1e-12])
@pytest.mark.parametrize("needs", ["y", "context", "parameters", "y and context", "one bias"])
@pytest.mark.parametrize("name", ["zuko MAF", "zuko NAF", "nflows affine", "normflows affine"])
def test_gradients_in_some_of_the_inputs(name: str, needs: str, tolerance: float) -> None:
    case, flow, y, c = problem(name)
    flow.requires_grad_(needs == "parameters")
    y.requires_grad_("y" in needs.split())
    c.requires_grad_("context" in needs)
    if needs == "one bias":
        ours = (p for name, p in flow.named_parameters() if name.endswith("bias") and "univariate" not in name)
        next(ours).requires_grad_()
    expected = gradients(case, flow, y, c, "x squared")
    with jf.accelerate(flow, tolerance):
        found = gradients(case, flow, y, c, "x squared")
    assert gap(expected, found) < (1e-8 if "NAF" in name else 1e-9)
    assert any(g is not None and g.any() for g in found)


def test_nothing_that_needs_a_gradient_gets_no_graph() -> None:
    case, flow, y, c = problem("nflows affine")
    flow.requires_grad_(False)
    with jf.accelerate(flow), counted(flow) as calls:
        out = case.invert(flow, y.detach(), c.detach())
        assert not any(part.requires_grad for part in out)
        without = sum(calls.values())
        with torch.no_grad():
            case.invert(flow, y, c)
        assert sum(calls.values()) == 2 * without


@pytest.mark.parametrize(("batch", "context"), [((), (5,)), ((5,), ()), ((3, 1), (5,)), ((5,), (3, 1))])
@pytest.mark.parametrize("tolerance", [0.0, 1e-13])
def test_gradients_where_zuko_broadcasts(batch: tuple[int, ...], context: tuple[int, ...], tolerance: float) -> None:
    case = CASES["zuko MAF"]
    flow = case.make(CONTEXT, FEATURES, dtype=torch.float64)
    y = normal(*batch, FEATURES, dtype=torch.float64).requires_grad_()
    c = normal(*context, CONTEXT, seed=1, dtype=torch.float64).requires_grad_()
    expected = gradients(case, flow, y, c, "x squared")
    with jf.accelerate(flow, tolerance):
        assert gap(expected, gradients(case, flow, y, c, "x squared")) < 1e-9


def test_reparametrised_samples() -> None:
    case = CASES["zuko NSF"]
    flow = case.make(CONTEXT, FEATURES, dtype=torch.float64)
    c = normal(5, CONTEXT, dtype=torch.float64).requires_grad_()

    def drawn() -> list[Tensor | None]:
        torch.manual_seed(3)
        x, log_prob = flow(c).rsample_and_log_prob((4,))
        return list(torch.autograd.grad((log_prob + x.pow(2).sum(dim=-1)).mean(), [c, *flow.parameters()]))

    expected = drawn()
    with jf.accelerate(flow):
        assert gap(expected, drawn()) < EXACT


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine", "normflows spline"])
def test_gradcheck(name: str) -> None:
    case, flow, y, c = problem(name, features=7)
    parameters = list(flow.parameters())
    chosen = [parameters[0], parameters[-1]]

    def inverse(y: Tensor, c: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return case.invert(flow, y, c)

    with jf.accelerate(flow):
        assert torch.autograd.gradcheck(inverse, (y[:2].detach().requires_grad_(), c[:2].detach().requires_grad_()))
        assert torch.autograd.gradcheck(inverse, (y.detach(), c.detach(), *chosen), fast_mode=True, atol=1e-4)


def test_rows_have_gradients_of_their_own() -> None:
    case, flow, y, c = problem("zuko MAF")
    with jf.accelerate(flow):
        whole = gradients(case, flow, y, c, "x squared")[0]
        rows = [gradients(case, flow, y[i : i + 1], c[i : i + 1], "x squared")[0] for i in range(len(y))]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-10, atol=1e-12)


def test_above_0_a_hard_row_of_small_weight_has_its_gradient_beside_an_easy_one_of_large_weight() -> None:
    # Of x_i = y_i + c x_(i-1) the gradient of the sum of x in y_j is 1 + c + c^2 + ..., with D - j terms.
    coefficients, scales = torch.tensor([[0.0], [0.8]]).double(), torch.tensor([[1e8], [1.0]]).double()
    flow, y = Chain(), normal(2, 40, dtype=torch.float64).requires_grad_()
    jf.accelerate(flow, 1e-6)
    (gradient,) = torch.autograd.grad((flow.inverse(y, coefficients)[0] * scales).sum(), y)
    terms = torch.arange(40, 0, -1).double()
    expected = torch.stack([torch.ones(40).double(), (1 - 0.8**terms) / (1 - 0.8)])
    torch.testing.assert_close(gradient / scales, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_a_row_that_is_not_a_number_does_not_spoil_the_gradients_of_others(tolerance: float) -> None:
    case, flow, y, c = problem("nflows affine")
    spoilt = y.detach().clone()
    spoilt[1, 3] = math.nan
    spoilt.requires_grad_()
    others = [0, 2, 3]

    def found() -> Tensor:
        return torch.autograd.grad(case.invert(flow, spoilt, c)[0][others].pow(2).sum(), spoilt)[0][others]

    expected = found()
    with jf.accelerate(flow, tolerance):
        assert gap([expected], [found()]) < (EXACT if tolerance == 0 else 1e-2)


# ------------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_backward_twice_accumulates(name: str) -> None:
    case, flow, y, c = problem(name)
    copied = copy.deepcopy(flow)
    jf.accelerate(flow)
    grads = []
    for used in (copied, flow):
        y.grad = c.grad = None
        loss = LOSSES["both"](case.invert(used, y, c))
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([y.grad.clone(), c.grad.clone(), *(p.grad for p in used.parameters())])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert gap(*grads) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    case, flow, y, c = problem("nflows affine")
    expected = gradients(case, flow, y, c, "x squared")
    with jf.accelerate(flow):
        x = checkpoint(lambda y, c: case.invert(flow, y, c)[0], y, c, use_reentrant=reentrant)
        x.pow(2).sum().backward()
        assert gap(expected, [y.grad, c.grad, *(p.grad for p in flow.parameters())]) < EXACT


def test_saved_tensors_kept_elsewhere() -> None:
    case, flow, y, c = problem("zuko MAF")
    expected = gradients(case, flow, y, c, "x squared")
    with jf.accelerate(flow), torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert gap(expected, gradients(case, flow, y, c, "x squared")) < EXACT


def test_jacobians_row_by_row_and_at_once() -> None:
    case, flow, y, c = problem("nflows affine", features=8)
    jacobian = torch.autograd.functional.jacobian
    inverse = lambda y: case.invert(flow, y, c)[0]  # noqa: E731
    expected = jacobian(inverse, y)
    with jf.accelerate(flow):
        assert gap([expected], [jacobian(inverse, y)]) < EXACT
        assert gap([expected], [jacobian(inverse, y, vectorize=True)]) < EXACT


@pytest.mark.parametrize("second", ["y", "parameters"])
@pytest.mark.parametrize("first", ["y", "parameters"])
@pytest.mark.parametrize("loss", ["x", "x squared", "log-determinant"])
@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_second_derivatives_are_refused(name: str, how: str, loss: str, first: str, second: str) -> None:
    case, flow, y, c = problem(name, features=7)
    given = {"y": [y], "parameters": list(flow.parameters())}

    def penalty() -> None:
        value = LOSSES[loss](case.invert(flow, y, c))
        gradient = torch.autograd.grad(value, given[first], create_graph=True, allow_unused=True)
        total = sum(g.pow(2).sum() for g in gradient if g is not None)
        if how == "grad":
            torch.autograd.grad(total, given[second], allow_unused=True)
        else:
            total.backward()

    penalty()  # the library has them
    with jf.accelerate(flow), pytest.raises(RuntimeError, match=r"twice|econd deriv|first deriv|create_graph"):
        penalty()


# ------------------------------------------------------------------------------------------------------------- training


def test_training_through_the_slow_density() -> None:
    def trained(accelerated: bool) -> tuple[list[float], list[Tensor]]:
        case = CASES["normflows affine"]
        base = normflows.distributions.DiagGaussian(FEATURES)
        model = normflows.NormalizingFlow(base, [case.make(0, FEATURES, seed=seed) for seed in range(2)])
        model = model.double().train()
        if accelerated:
            jf.accelerate(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        losses = []
        for step in range(5):
            optimizer.zero_grad()
            loss = model.forward_kld(0.5 * normal(8, FEATURES, seed=step, dtype=torch.float64))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses, [p.detach() for p in model.parameters()]

    (own, expected), (accelerated, found) = trained(False), trained(True)
    assert own == pytest.approx(accelerated, rel=1e-10)
    assert len(set(own)) == 5
    assert gap(expected, found) < 1e-9


def test_training_through_samples_moves_what_the_next_inverse_sees() -> None:
    case, flow, y, c = problem("nflows affine")
    jf.accelerate(flow)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        case.invert(flow, y, c)[0].pow(2).mean().backward()
        optimizer.step()
        plain = case.make(CONTEXT, FEATURES, dtype=torch.float64)
        plain.load_state_dict(flow.state_dict())
        assert same_bits(case.invert(flow, y, c), case.invert(plain, y, c))
