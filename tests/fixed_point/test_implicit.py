"""Gradients of a fixed point without a graph of its solve, against those of a solve with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.fixed_point.implicit import with_gradient
from tests.models.test_token_flows import case, randn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["orders", "rows", "classes", "sizes", "one token"])
@pytest.mark.parametrize("strategy", ["sequential", "jacobi"])
def test_gradients_are_those_of_a_solve_with_a_graph(name: str, strategy: str) -> None:
    """Of the latents, a context of numbers, and the parameters, through x and its density."""
    flow, context, z = case(name)
    inputs = [z.requires_grad_(), *flow.parameters()]
    if context is not None and context.is_floating_point():
        inputs.append(context.requires_grad_())
    weights = randn(*z.shape)

    def gradients(x: Tensor, log_prob: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((weights * x.sin()).sum() + log_prob.square().sum(), inputs, allow_unused=True))

    x, log_prob = jf.decode(flow, z, context, strategy=strategy, tolerance=1e-13, log_prob=True)
    unrolled = z
    for block in reversed(flow.blocks):
        y, tokens = block.permutation(unrolled), list[Tensor]()
        for t in range(z.shape[1]):
            so_far = torch.stack([*tokens, *[torch.zeros_like(y[:, 0])] * (z.shape[1] - t)], dim=1)
            log_scale, shift = block(so_far, context)
            tokens.append(y[:, t] * log_scale[:, t].exp() + shift[:, t])
        unrolled = block.permutation.inverse(torch.stack(tokens, dim=1))
    for have, want in zip(gradients(x, log_prob), gradients(unrolled, flow.log_prob(unrolled, context)), strict=True):
        assert (have is None) == (want is None) or (have if want is None else want).abs().max() == 0
        if have is not None and want is not None:
            torch.testing.assert_close(have, want, rtol=1e-7, atol=1e-9)


def test_the_temperature_of_a_context_counts() -> None:
    flow, labels, z = case("classes")
    block, context, u = flow.blocks[0], jf.Context(labels, torch.tensor([0.2, 1.0, 5.0])), randn(*z.shape)
    x = jf.solve(block, z, jf.Solver(jf.Sequential()), context).x.requires_grad_()
    (v,) = torch.autograd.grad(with_gradient(jf.Problem(block, z.requires_grad_(), context), (), x, x)[0], z, u)
    (back,) = torch.autograd.grad(block.encode(x, context)[0], x, v)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_a_sample_that_overflows_does_not_spoil_the_gradients_of_others() -> None:
    flow, _, z = case("plain")
    lost, parameters = z.clone(), list(flow.parameters())
    lost[0] = 1.7e308

    def gradients(z: Tensor) -> list[Tensor]:
        x, log_prob = jf.decode(flow, z, strategy="sequential", log_prob=True)
        return list(torch.autograd.grad(x[-2:].sum() + log_prob[-2:].sum(), parameters))

    assert jf.decode(flow, lost, strategy="sequential")[0].isnan().any()
    for have, want in zip(gradients(lost), gradients(z), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


class Constant(torch.autograd.Function):
    """The identity, which autograd takes for a constant only when it is asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        return None


@pytest.mark.parametrize("strategy", ["sequential", "jacobi"])
def test_a_loss_without_a_gradient_in_a_solution_has_none_in_its_inputs(strategy: str) -> None:
    flow, _, z = case("plain")
    x = jf.decode(flow, z.requires_grad_(), strategy=strategy)
    assert torch.autograd.grad(Constant.apply(x).sum(), z, allow_unused=True) == (None,)


def test_second_derivatives_are_refused() -> None:
    flow, _, z = case("plain")
    x = jf.decode(flow, z.requires_grad_(), strategy="sequential")
    with pytest.raises(RuntimeError, match="decode has no second derivatives"):
        torch.autograd.grad(x.sum(), z, create_graph=True)
