"""Fixed-point passes x <- g(x) until they change nothing, with the gradient of the solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Pass = Callable[[Tensor, Tensor, Tensor | None], Sequence[Tensor]]
"""x, y, context -> (g(x), ...): the next iterate, and the library's other results, with a row for each row of x."""

_LEAVING = 0.25  # share of the batch within the tolerance from which these rows leave, as the rest is copied


def iterate(
    step: Pass,
    y: Float[Tensor, "*batch d"],
    context: Float[Tensor, "*batch c"] | None,
    passes: int,
    tolerance: float,
    needs_graph: bool,
    x: Float[Tensor, "*batch d"],
    is_solved: bool = False,
) -> tuple[Sequence[Tensor], int]:
    """Returns the results of the last of at most `passes` passes x <- g(x), and the number of passes.

    At tolerance 0 they end when one returns its argument bit for bit: g is a function, so all later ones would return
    it too, and the answer is that of all `passes`. Above 0 a row ends when a pass changes none of its entries by more
    than the tolerance, and keeps the result of that pass. Rows that have ended leave the batch together, when they are
    a quarter of it.

    Args:
        step: A pass.
        y: For a tolerance above 0 with a row for each sample, (B, D).
        context: For a tolerance above 0 with a row for each sample, (B, C).
        passes: At least 2.
        tolerance: See above.
        needs_graph: Whether the result has the graph of the solution, see `_Implicit`.
        x: The first iterate.
        is_solved: Whether `x` is the solution to rounding, so that only the pass with a graph is made.
    """
    until = _until_equal if tolerance == 0 else partial(_until_close, tolerance=tolerance)
    with torch.no_grad():
        outputs, count = ((x,), 0) if is_solved else until(step, x, y, context, passes - needs_graph)
    if not needs_graph:
        return outputs, count
    with torch.enable_grad():
        x = outputs[0].detach().requires_grad_()
        return _Implicit.apply(x, passes, tolerance, *step(x, y, context)), count + 1


def _until_equal(step: Pass, x: Tensor, y: Tensor, context: Tensor | None, passes: int) -> tuple[Sequence[Tensor], int]:
    count, outputs = 1, step(x, y, context)
    while count < passes and not _have_same_bits(outputs[0], x):
        x = outputs[0]
        count, outputs = count + 1, step(x, y, context)
    return outputs, count


def _until_close(
    step: Pass, x: Tensor, y: Tensor, context: Tensor | None, passes: int, tolerance: float
) -> tuple[Sequence[Tensor], int]:
    rows = torch.arange(len(x), device=x.device)
    results: list[Tensor] = []
    count, outputs = 1, step(x, y, context)
    while count < passes:
        is_close = (outputs[0] - x).abs().flatten(1).amax(dim=1) <= tolerance  # never if it is NaN
        share = float(is_close.float().mean())
        if share == 1:
            break
        x = outputs[0]
        if share >= _LEAVING:
            results = results or [output.new_empty(len(rows), *output.shape[1:]) for output in outputs]
            _write(results, rows[is_close], [output[is_close] for output in outputs])
            rows, x, y = rows[~is_close], x[~is_close], y[~is_close]
            context = None if context is None else context[~is_close]
        count, outputs = count + 1, step(x, y, context)
    if not results:
        return outputs, count
    _write(results, rows, outputs)
    return results, count


def _write(results: Sequence[Tensor], rows: Tensor, outputs: Sequence[Tensor]) -> None:
    for result, output in zip(results, outputs, strict=True):
        result[rows] = output


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _have_same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are equal bit for bit: a NaN equals itself, and 0 is not -0."""
    if a.dtype != b.dtype:  # if the library promotes the first iterate
        return False
    return torch.equal(a.view(_BITS[a.itemsize]), b.view(_BITS[b.itemsize]))


class _Implicit(torch.autograd.Function):
    """Gives the graph of one pass at a solution x = g(x, theta) the gradient of the solution.

    By the implicit function theorem, cotangents u of x and w of the other outputs h(x, theta) give
    v = u + J^T v + (dh/dx)^T w, with J = dg/dx at the solution. J is nilpotent, so that iterating v from u ends after
    at most as many vector-Jacobian products as the inverse has passes. The gradient in theta is that of one pass, of
    the cotangents v and w.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, passes: int, tolerance: float, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *outputs)
        ctx.passes, ctx.tolerance = passes, tolerance
        ctx.set_materialize_grads(False)
        results = tuple(output.view_as(output) for output in outputs)
        ctx.mark_non_differentiable(*(r for r, o in zip(results, outputs, strict=True) if not o.requires_grad))
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # there is no graph of how the solution itself depends on theta
            raise RuntimeError(
                "create_graph=True: an accelerated inverse has no second derivatives; restore() the flow first"
            )
        x, *outputs = ctx.saved_tensors
        u = torch.zeros_like(outputs[0]) if cotangents[0] is None else cotangents[0]
        others = [pair for pair in zip(outputs[1:], cotangents[1:], strict=True) if pair[1] is not None]
        can_compare = not _is_batched(u)
        v = u
        for _ in range(ctx.passes):
            pairs = [(outputs[0], v), *others]
            (change,) = torch.autograd.grad(
                [output for output, _ in pairs], x, [w for _, w in pairs], retain_graph=True, allow_unused=True
            )
            old, v = v, u if change is None else u + change
            if can_compare and _has_converged(v, old, ctx.tolerance):
                break
        return (None, None, None, v, *cotangents[1:])


def _is_batched(cotangent: Tensor) -> bool:
    """True in a vmap, whose values cannot be compared, and if PyTorch does not tell."""
    check = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    return check is None or check(cotangent)


def _has_converged(new: Tensor, old: Tensor, tolerance: float) -> bool:
    """True if no row of the cotangents, (B, D) or (D,), changed by more than the tolerance times its largest entry."""
    change, size = (torch.atleast_2d(part.abs()).flatten(1).amax(dim=1) for part in (new - old, new))
    return bool((change <= tolerance * size).all())
