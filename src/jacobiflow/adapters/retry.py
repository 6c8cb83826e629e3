"""Rows whose inverse failed in float32, solved again in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.adapters.network import needs_graph
from jacobiflow.adapters.start import Solvable

Inverse = Callable[[Any, Tensor, Tensor | None], Sequence[Tensor]]
"""module, y (*batch, D), context (*batch, C) -> (x, ...), with a row for each row of the batch."""


def with_retry(
    inverse: Inverse,
    module: Solvable,
    y: Float[Tensor, "*batch d"],
    context: Float[Tensor, "*batch c"] | None,
    as_rows: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] = lambda *inputs: inputs,
) -> Sequence[Tensor]:
    """The result of `inverse`; if the acceleration asks for it, failed rows are solved in float64 and rounded.

    A row failed if its result is not finite although y is. If the elementwise inverse refuses an argument, all rows
    failed. An inverse with a gradient is not tried again. `as_rows` makes (B, D) and (B, C) of y and the context.

    **Raises:** what `inverse` raises in float64, and all its other errors.
    """
    retry = module.acceleration.retry_float64 and y.dtype == torch.float32 and not needs_graph(module, y, context)
    if not retry:
        return inverse(module, y, context)
    outputs: Sequence[Tensor] = ()
    with suppress(*module.refusals):  # nflows asserts that a discriminant is not negative
        outputs = inverse(module, y, context)
    y, context = as_rows(y, context)
    failed = _failed(y, outputs) if outputs and len(y) else torch.ones(len(y), dtype=torch.bool, device=y.device)
    if not failed.any():
        return outputs
    precise = copy.deepcopy(module).double()
    precise.__class__ = type(module)  # a copy is the library's own
    again = inverse(precise, y[failed].double(), None if context is None else context[failed].double())
    module.acceleration.count_retried(int(failed.sum()))
    if not outputs:
        return [output.to(y.dtype) for output in again]
    return [_replaced(output, failed, other) for output, other in zip(outputs, again, strict=True)]


def _replaced(output: Float[Tensor, "*batch d"], rows: Bool[Tensor, " b"], other: Float[Tensor, "k d"]) -> Tensor:
    """A copy of `output` with some of its rows replaced."""
    copied = output.reshape(len(rows), *other.shape[1:]).clone()
    copied[rows] = other.to(output.dtype)
    return copied.view(output.shape)


def _failed(y: Float[Tensor, "b d"], outputs: Sequence[Tensor]) -> Bool[Tensor, " b"]:
    finite = torch.stack([output.isfinite().reshape(len(y), -1).all(dim=1) for output in outputs])
    return y.isfinite().all(dim=1) & ~finite.all(dim=0)
