"""Compositions with layers that native code does not take: the others are computed in runs."""

from __future__ import annotations

import copy
from typing import Any

import nflows.transforms as nf
import pytest
import torch

import jacobiflow as jf
from jacobiflow.native.library import Library
from tests.adapters.test_changes import MIXED, build
from tests.helpers.library_flows import default_dtype, gradient_gap, normal, values

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", MIXED)
@default_dtype(DOUBLE)
def test_layers_that_follow_each_other_are_one_native_call(
    name: str, is_inverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, calls, evaluate_chain = build(name), [], Library.evaluate_chain
    monkeypatch.setattr(Library, "evaluate_chain", lambda *args: calls.append(args) or evaluate_chain(*args))
    x = normal(5, 5, dtype=DOUBLE).requires_grad_()

    def second_derivatives() -> Any:
        loss = sum(part.sin().sum() for part in values(flow, x, None, is_inverse))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *flow.parameters()], allow_unused=True)

    expected = second_derivatives()
    with jf.accelerate(flow) as handle:
        assert gradient_gap(expected, second_derivatives()) < 1e-9
        assert len(calls) == 2
        assert set(handle.backends.values()) == {"native"} and len(handle.backends) == len(handle.transforms) > 1
        copied = copy.deepcopy(flow)
    assert [type(part) for part in copied.modules()] == [type(part) for part in flow.modules()]


def test_the_handle_lists_every_layer_with_the_reason() -> None:
    flow: Any = build("nflows mixed")
    masked, unknown = "nflows MaskedAffineAutoregressiveTransform, by", "nflows LeakyReLU, by the library"
    assert str(jf.accelerate(flow)).splitlines() == [
        "accelerated, exact to rounding: 2 transforms",
        f"  _transforms.0; _transforms.3._transforms.0: {masked} native code",
        "  _transforms.1, 4; _transforms.3._transforms.1: nflows ReversePermutation, by native code",
        f"  _transforms.2: {unknown}: native code does not take LeakyReLU",
    ]
    assert str(jf.accelerate(flow, 0.0)).splitlines()[1:] == [
        f"  _transforms.0; _transforms.3._transforms.0: {masked} passes",
        "  _transforms.1, 4; _transforms.3._transforms.1: nflows ReversePermutation, by the library",
        f"  _transforms.2: {unknown}",
    ]
    alone = nf.CompositeTransform([*flow._transforms[:1], nf.LeakyReLU(), nf.ReversePermutation(5)])
    assert "_transforms.2: nflows ReversePermutation, by the library: native code" in str(jf.accelerate(alone))
