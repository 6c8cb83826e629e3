"""Gradients of a fixed point x = g(x, theta) by the implicit function theorem, without a graph of how it was solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from jacobiflow.blocks.base import TokensLogDet
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import UnsupportedError
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.utils.autograd import check_first_derivative

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-13}
"""The largest change by the last backward sweep, relative to the largest entry of a sample."""


def solve_adjoint(
    outputs: Sequence[Tensor], x: Tensor, cotangents: Sequence[Tensor | None], max_sweeps: int,
    has_converged: Callable[[Tensor, Tensor], bool],
) -> Tensor:  # fmt: skip
    """Returns the cotangent v of g(x): v = u + J^T v + (dh/dx)^T w, with J = dg/dx.

    `outputs` are g(x), h(x), .. as graphs from `x`, `cotangents` u, w, .. those of the solution x and of the other
    outputs. J is nilpotent, so sweeps from u end after at most as many as the inverse has. They end early when
    `has_converged(v, last v)`. Derivatives in theta are those of `outputs`, with the cotangents v, w, ..
    """
    u = torch.zeros_like(outputs[0]) if cotangents[0] is None else cotangents[0]
    others = [(h, w) for h, w in zip(outputs[1:], cotangents[1:], strict=True) if w is not None and h.requires_grad]
    v = u
    for _ in range(max_sweeps):
        pairs = [(outputs[0], v), *others]
        (change,) = torch.autograd.grad(
            [output for output, _ in pairs], x, [w for _, w in pairs], retain_graph=True, allow_unused=True
        )
        old, v = v, u if change is None else u + change
        if has_converged(v, old):
            break
    return v


def with_gradient(problem: Problem, parameters: Sequence[Tensor], x: Tokens, log_det: Tensor) -> TokensLogDet:
    """Returns a solution x and its log-determinant with gradients in z, a context of numbers, and the parameters.

    The block is an `AffineBlock`. The graph holds x and z only: the backward pass evaluates the block again, so that
    the activations of one block are in memory at a time.
    """
    return _Inverse.apply(problem, x, log_det, problem.z, problem.context.values, *parameters)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, x: Tensor, log_det: Tensor, z: Tensor, values: Tensor | None, *parameters: Tensor
    ) -> TokensLogDet:
        x, log_det = x.view_as(x), log_det.view_as(log_det)
        ctx.save_for_backward(x, z, values, *parameters)  # so that autograd notices if one of them has changed
        ctx.block, ctx.context = problem.block, problem.context
        ctx.set_materialize_grads(False)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        check_first_derivative("decode", "write the loss with flow.encode instead")
        x, z, values, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
            if ctx.needs_input_grad[4]:
                values = values.detach().requires_grad_()
            problem = Problem(ctx.block, z, replace(ctx.context, values=values))
            try:
                outputs = ctx.block.sequential_inverse(z, problem.context)
            except UnsupportedError:
                outputs = problem.evaluate(x)
                cotangents = solve_adjoint(outputs, x, cotangents, x.shape[1], _has_converged), cotangents[1]
        pairs = [(o, v) for o, v in zip(outputs, cotangents, strict=True) if o.requires_grad and v is not None]
        needs = ctx.needs_input_grad[3:]
        inputs = list(compress((z, values, *parameters), needs))
        ends, seeds = zip(*pairs, strict=True)
        gradients = iter(torch.autograd.grad(ends, inputs, seeds, allow_unused=True))
        return (None, None, None, *(next(gradients) if need else None for need in needs))


def _has_converged(new: Tensor, old: Tensor) -> bool:
    bound = _TOLERANCE[new.dtype] * new.abs().amax(dim=(1, 2))
    return not bool(((new - old).abs().amax(dim=(1, 2)) > bound).any())  # No sweep removes a NaN.
