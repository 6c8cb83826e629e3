"""Chains of masked transforms: a row far outside of a spline, and tensors that no longer fit."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import jacobiflow as jf
from jacobiflow.native.tensors import addresses_of
from tests.helpers.library_flows import CASES, gradient_gap, gradients, normal, values

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["zuko NSF", "nflows rational"])
def test_a_row_far_outside_of_a_spline_has_the_gradients_of_the_library(name: str) -> None:
    """Its position in the bin, squared, overflows, and its gradients of 0 are added to those of other rows."""
    flow, x = CASES[name].make(0, 5), normal(6, 5)
    x[2, 1] = 1e20
    x.requires_grad_()
    expected = gradients(flow, x, None, False, [None, torch.ones(6)])
    with jf.accelerate(flow) as handle:
        result = gradients(flow, x, None, False, [None, torch.ones(6)])
    assert set(handle.backends.values()) == {"native"}
    assert gradient_gap(expected, result) < 1e-3


def test_a_saved_tensor_that_a_hook_replaces_by_one_of_another_dtype_is_not_read() -> None:
    flow = CASES["nflows feed-forward"].make(2, 5).double()
    x, context = normal(3, 5).double().requires_grad_(), normal(3, 2).double()
    with jf.accelerate(flow), saved_tensors_hooks(lambda t: t, lambda t: t.float() if t.shape == (3, 2) else t):
        z, _ = flow.inverse(x, context)
    with pytest.raises(jf.UnsupportedError, match="float32"):
        z.sum().backward()


def test_a_tensor_whose_sign_is_not_applied_yet_is_not_read() -> None:
    with pytest.raises(jf.UnsupportedError):
        addresses_of([torch._neg_view(torch.ones(2))], [(2,)], torch.float32)


@pytest.mark.parametrize("shape", [(2, 5, 8), (16, 5), (4, 20)])
def test_a_weight_that_is_reshaped_in_place_is_left_to_the_library(shape: tuple[int, ...]) -> None:
    """Its values stay where they are, and so does their number; zuko refuses them."""
    flow, x = CASES["zuko MAF"].make(0, 5, hidden=16), normal(3, 5)
    with jf.accelerate(flow):
        values(flow, x, None, False)
        for parameter in flow.parameters():
            if parameter.shape == (16, 5):
                parameter.data = parameter.data.view(shape)
        if shape == (16, 5):
            values(flow, x, None, False)
        else:
            with pytest.raises(RuntimeError):
                values(flow, x, None, False)
