"""Gradients of a fixed point x = g(x, theta) by the implicit function theorem, without a graph of how it was solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.utils.autograd import check_first_derivative

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-13}  # of backward sweeps, relative to a sample's largest entry
Solve = Callable[[Tensor], tuple[Tensor, Tensor]]
"""z -> the solution x = g(x) at z, and the sums of log_scale(x)."""


def solve_adjoint(
    outputs: Sequence[Tensor], x: Tensor, cotangents: Sequence[Tensor | None], max_sweeps: int,
    is_close: Callable[[Tensor, Tensor], bool],
) -> Tensor:  # fmt: skip
    """Returns the cotangent v of g(x): v = u + J^T v + (dh/dx)^T w, with J = dg/dx.

    `outputs` are g(x), h(x), .. as graphs from `x`, `cotangents` u, w, .. those of the solution x and of the other
    outputs. J is nilpotent, so sweeps from u end after at most as many as the inverse has. They end early when
    `is_close(v, last v)`. Derivatives in theta are those of `outputs`, with the cotangents v, w, ..
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
        if is_close(v, old):
            break
    return v


def invert_with_gradient(
    block: Any, parameters: Sequence[Tensor], solve: Solve, z: Float[Tensor, "b t c"], context: Tensor | None
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, " b"]]:
    """Returns `solve(z)` with gradients in z, in a context of numbers, and in the parameters of an `AffineBlock`.

    The graph holds x and z only: the backward pass evaluates the block again, so that the activations of one block are
    in memory at a time.
    """
    return _Inverse.apply(block, solve, z, context, *parameters)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Any, solve: Solve, z: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, log_det = solve(z)
        ctx.save_for_backward(x, z, context, *parameters)  # so that autograd notices if one of them has changed
        ctx.block = block
        ctx.set_materialize_grads(False)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        check_first_derivative("decode", "write the loss with flow.encode instead")
        x, z, context, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
            if ctx.needs_input_grad[3]:
                context = context.detach().requires_grad_()
            outputs = ctx.block.exact_inverse(z, context) if ctx.block.has_inverse_gradients else None
            if outputs is None:
                log_scale, shift = ctx.block.affine_whole(x, context)
                outputs = [torch.addcmul(shift, log_scale.exp(), z), log_scale.sum(dim=(1, 2))]
                cotangents = solve_adjoint(outputs, x, cotangents, x.shape[1], _is_close), cotangents[1]
        pairs = [(o, v) for o, v in zip(outputs, cotangents, strict=True) if o.requires_grad and v is not None]
        needs = ctx.needs_input_grad[2:]
        inputs = list(compress((z, context, *parameters), needs))
        ends, seeds = zip(*pairs, strict=True)
        gradients = iter(torch.autograd.grad(ends, inputs, seeds, allow_unused=True))
        return (None, None, *(next(gradients) if need else None for need in needs))


def _is_close(new: Tensor, old: Tensor) -> bool:
    bound = _TOLERANCE[new.dtype] * new.abs().amax(dim=(1, 2))
    return not bool(((new - old).abs().amax(dim=(1, 2)) > bound).any())  # a NaN stays one
