"""Rows whose inverse failed in float32, solved again in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.adapters.network import needs_graph
from jacobiflow.adapters.start import Solvable

Inverse = Callable[[Any, Tensor, Tensor | None], Sequence[Tensor]]
"""module, y (B, D), context (B, C) -> (x, ...), with a row for each row of y."""


def with_retry(
    inverse: Inverse, module: Solvable, y: Float[Tensor, "b d"], context: Float[Tensor, "b c"] | None
) -> Sequence[Tensor]:
    """What `inverse` gives, where the acceleration asks for it with failed rows solved in float64 and rounded.

    A row failed where what it gives is not finite, and y is. Where `inverse` raises an error, all rows did. An inverse
    with a gradient is not tried again.

    **Raises:** what `inverse` raises in float64.
    """
    retry = module.acceleration.retry_float64 and y.dtype == torch.float32 and not needs_graph(module, y, context)
    if not retry:
        return inverse(module, y, context)
    try:
        outputs = list(inverse(module, y, context))
        failed = _failed(y, outputs)
    except Exception:  # nflows asserts that a discriminant is not negative, and raises errors of its own
        outputs, failed = [], torch.ones(len(y), dtype=torch.bool, device=y.device)
    if not failed.any():
        return outputs
    precise = copy.deepcopy(module).double()
    precise.__class__ = type(module)  # a copy is the library's own
    again = inverse(precise, y[failed].double(), None if context is None else context[failed].double())
    module.acceleration.count_retried(int(failed.sum()))
    if not outputs:
        return [output.to(y.dtype) for output in again]
    for output, other in zip(outputs, again, strict=True):
        output[failed] = other.to(y.dtype)
    return outputs


def _failed(y: Float[Tensor, "b d"], outputs: Sequence[Tensor]) -> Bool[Tensor, " b"]:
    finite = torch.stack([output.isfinite().reshape(len(y), -1).all(dim=1) for output in outputs])
    return y.isfinite().all(dim=1) & ~finite.all(dim=0)
