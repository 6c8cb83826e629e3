"""Couplings and linear layers of all libraries: sizes, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import glasflow
import glasflow.nflows.transforms as gf
import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import pytest
import torch
from pyro.nn import DenseNN
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.native.library import Library
from tests.adapters.test_native import check_gradients
from tests.helpers.library_flows import check, coupling_net, couplings, gradient_gap, normal

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

DOUBLE = torch.float64
MASK = torch.arange(4) % 2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("library", "features"), [(nf, 2), (nf, 3), (nf, 5), (nf, 10), (gf, 3)])
def test_values_and_gradients_in_and_outside_of_the_tails(library: Any, features: int, context: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        flow = library.CompositeTransform([couplings(features, context, 16, library) for _ in range(2)]).double()
        x = 2 * normal(70, features, seed=seed, dtype=DOUBLE)
        c = normal(70, context, seed=seed + 9, dtype=DOUBLE) if context else None
        for each in (c, None if c is None else c[:1].expand(70, -1)):
            check(flow, x, each)
        check_gradients(flow, x.requires_grad_(), None if c is None else c.requires_grad_())


@pytest.mark.parametrize("make", [pt.affine_coupling, pt.spline_coupling])
def test_a_coupling_of_one_feature_has_gradients_of_its_biases(make: Any) -> None:
    transform, x = make(1).double(), normal(40, 1, dtype=DOUBLE)
    for parameter in transform.parameters():
        parameter.data.normal_()

    def gradients() -> tuple[Tensor, ...]:
        loss = transform(x.clone()).square().sum()  # pyro keeps the result for a tensor that it has seen
        return torch.autograd.grad(loss, [*transform.parameters()], allow_unused=True, materialize_grads=True)

    expected = gradients()
    with jf.accelerate(transform) as handle:
        torch.testing.assert_close(gradients(), expected)
        assert handle.backends == {"": "native"}
    nothing = pt.AffineCoupling(3, DenseNN(3, [8], [0, 0]))
    assert "transforms no feature" in str(jf.accelerate(nothing))


@pytest.mark.parametrize("mode", ["channel", "channel_inv"])
def test_couplings_and_constant_splines_of_normflows(mode: str) -> None:
    torch.manual_seed(0)
    sizes = [3, 16, 4] if mode == "channel" else [2, 16, 6]
    layers = [
        normflows.flows.AffineCouplingBlock(normflows.nets.MLP(sizes, 0.1), scale_map="sigmoid_inv", split_mode=mode),
        normflows.flows.AffineConstFlow(5),
        normflows.flows.CoupledRationalQuadraticSpline(5, 1, 16),
    ]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(5), layers).double()
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = normal(70, 5, dtype=DOUBLE)
    check(flow, x, None)
    check_gradients(flow, x.requires_grad_())


def test_a_coupling_that_reads_only_the_context() -> None:
    flow = nf.AffineCouplingTransform(torch.ones(2), partial(coupling_net, context=3)).double()
    x, context = normal(9, 2, dtype=DOUBLE), normal(9, 3, dtype=DOUBLE)
    check(flow, x, context)
    check_gradients(flow, x.requires_grad_(), context.requires_grad_())


def unconditional_linear() -> nn.Module:
    return nf.AffineCouplingTransform(MASK, coupling_net, unconditional_transform=nf.LULinear)


def affine_coupling(scale: Any) -> nn.Module:
    return gf.AffineCouplingTransform(MASK, partial(coupling_net, library=gf), scale_activation=scale)


REFUSED = {
    "the scale_activation <lambda>": lambda: affine_coupling(lambda p: p.exp()),
    "the unconditional transform LULinear": unconditional_linear,
    "BatchNorm1d in its network": lambda: nf.AffineCouplingTransform(MASK, partial(coupling_net, use_batch_norm=True)),
    "an activation in place": lambda: nf.AffineCouplingTransform(
        MASK, partial(coupling_net, activation=nn.ReLU(inplace=True))
    ),
    "AdditiveCouplingTransform": lambda: nf.AdditiveCouplingTransform(MASK, coupling_net),
}


def test_rows_of_inference_mode_have_gradients_in_the_weights() -> None:
    flow = couplings(4, 0, 16)
    with torch.inference_mode():
        x = torch.randn(9, 4)
    expected = torch.autograd.grad(flow.eval()(x)[1].sum(), [*flow.parameters()], allow_unused=True)
    with jf.accelerate(flow):
        result = torch.autograd.grad(flow(x)[1].sum(), [*flow.parameters()], allow_unused=True)
    assert gradient_gap(expected, result) < 1e-3


@torch.no_grad()
def test_runs_are_those_of_the_present_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, evaluate_chain = [], Library.evaluate_chain
    monkeypatch.setattr(Library, "evaluate_chain", lambda *args: calls.append(args) or evaluate_chain(*args))
    layers = [nf.AffineCouplingTransform(MASK, partial(coupling_net, dropout_probability=0.2)) for _ in range(3)]
    flow = nf.CompositeTransform([nf.SVDLinear(4, 2), *layers])
    with jf.accelerate(flow):
        for is_training in (True, False):
            calls.clear()
            flow.train(is_training)(torch.randn(5, 4))
            assert len(calls) == (0 if is_training else 1)


def test_both_scales_of_glasflow_and_batch_norm_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    kind = gf.AffineCouplingTransform
    layers = [
        affine_coupling(kind.GENERAL_SCALE_ACTIVATION), gf.BatchNorm(4), affine_coupling(kind.DEFAULT_SCALE_ACTIVATION),
    ]  # fmt: skip
    flow = gf.CompositeTransform(layers).double()
    for parameter in flow.parameters():
        parameter.data += torch.randn_like(parameter)
    flow(normal(70, 4, dtype=DOUBLE))
    x = 3 * normal(70, 4, dtype=DOUBLE)
    check(flow.eval(), x, None)
    check_gradients(flow, x.requires_grad_())


@pytest.mark.parametrize("what", REFUSED)
def test_what_native_code_does_not_know_is_left_alone(what: str) -> None:
    assert jf.accelerate(REFUSED[what]()).reasons == {"": f"native code does not take {what}"}


def test_couplings_between_layers_that_native_code_does_not_know() -> None:
    flow: Any = glasflow.CouplingNSF(4, 3, linear_transform="lu", batch_norm_between_transforms=True).double()
    flow(x := normal(40, 4, dtype=DOUBLE))
    flow._transform._transforms[4].register_forward_hook(lambda *_: None)
    for is_training in (True, False):
        flow.train(is_training)
        expected = [*flow.forward(x), *(() if is_training else flow.inverse(x))]
        with jf.accelerate(flow) as handle:
            torch.testing.assert_close([*flow.forward(x), *(() if is_training else flow.inverse(x))], expected)
    assert str(handle).splitlines()[1:4] == [
        "  _transform._transforms.1, 7: glasflow PiecewiseRationalQuadraticCouplingTransform, by native code",
        "  _transform._transforms.4: glasflow PiecewiseRationalQuadraticCouplingTransform, by the library: native code "
        "does not take a hook on PiecewiseRationalQuadraticCouplingTransform",
        "  _transform._transforms.2, 5, 8: glasflow BatchNorm, by native code",
    ]


@torch.no_grad()
def test_the_first_batch_initializes_an_actnorm() -> None:
    flow = nf.CompositeTransform([nf.ActNorm(4), couplings(4, 0, 16).eval()]).double()
    original, x = copy.deepcopy(flow), normal(50, 4, dtype=DOUBLE)
    with jf.accelerate(flow):
        for _ in range(2):
            torch.testing.assert_close(flow(x), original(x), rtol=1e-9, atol=1e-9)
    assert flow._transforms[0].initialized


@torch.no_grad()
def test_a_cache_of_weights_is_used_if_the_library_has_filled_it() -> None:
    flow, x = couplings(4, 0, 16).eval(), normal(5, 4)
    flow._transforms[1].use_cache()
    for is_filled in (False, True):
        flow.train().eval()  # which empties the cache
        if is_filled:
            flow(x)
        for parameter in flow._transforms[1].parameters():
            parameter += 0.5
        expected = copy.deepcopy(flow)(x)
        with jf.accelerate(flow):
            torch.testing.assert_close(flow(x), expected, rtol=1e-5, atol=1e-5)
