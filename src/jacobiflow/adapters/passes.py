"""The inverse of a masked autoregressive transform by passes of the library's network, or by the library's own loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.chain import Library
from jacobiflow.adapters.fixed_point import Pass, invert
from jacobiflow.adapters.network import needs_all_passes
from jacobiflow.adapters.swapped import Swapped

_FEWEST_PASSES = 6  # from 0: below, none is saved, and comparing iterates costs more than it gains


class Solvable(Swapped):
    """An accelerated transform."""

    library: ClassVar[Library]

    refusals: ClassVar[tuple[type[Exception], ...]] = (AssertionError,)
    """Errors of its elementwise inverse at an argument that it cannot invert."""

    is_jacobi: ClassVar[bool] = True
    """True if each pass x <- g(x) of the library's own loop sets all features."""

    @property
    def owner(self) -> nn.Module:
        """The module of the flow that holds its parameters: itself, unless that made it for a context."""
        return vars(self).get("_owner", self)

    def first_iterate(self, y: Tensor) -> Tensor:
        """The x from which the library's own loop starts."""
        return torch.zeros_like(y)

    @abstractmethod
    def rows(self, y: Tensor, context: Tensor | None) -> tuple[Float[Tensor, "b d"], Float[Tensor, "#b c"] | None]:
        """The inputs with a row for each sample of the batch, or one row of the context for all."""


def solve(
    module: Solvable,
    step: Pass,
    y: Float[Tensor, "*batch d"],
    context: Float[Tensor, "*batch c"] | None,
    passes: int,
    graph: bool,
) -> Sequence[Tensor] | None:
    """The results of the last pass; `None` if the inverse is left to the library's own loop.

    That loop also decides if other passes may spread a value that is not finite in another way, or if a pass from an
    answer of native code is refused.
    """
    acceleration, start = module.acceleration, None
    is_left = needs_all_passes(module.owner, y, graph) or not (module.is_jacobi or _are_finite(y, context))
    if not is_left:
        start = _answer_of_native_code(module, y, context)
        is_left = start is None and passes < _FEWEST_PASSES
    if is_left:
        acceleration.count(module.owner, passes, "library")
        return None
    tolerance = acceleration.tolerance or 0.0
    if tolerance > 0:
        y, context = _all_rows(*module.rows(y, context))
    is_solved = start is not None and acceleration.tolerance != 0 and graph
    x = module.first_iterate(y) if start is None else start.view(*_batch(y, context), y.shape[-1])
    try:
        outputs, count = invert(step, y, context, passes, tolerance, graph, x, is_solved)
    except module.refusals:
        if start is None:  # the library's own passes raise it too
            raise
        outputs, count = (), 1
    # A value that is not finite is the library's if the passes are its own.
    if not outputs or not ((module.is_jacobi and start is None) or _are_finite(*outputs)):
        acceleration.count(module.owner, count + passes, "library")
        return None
    acceleration.count(module.owner, count, "passes")
    return outputs


@torch.no_grad()
def _answer_of_native_code(module: Solvable, y: Tensor, context: Tensor | None) -> Float[Tensor, "b d"] | None:
    """The inverse to start from, if all of it is finite and so moderate that no iterate of the library overflows."""
    rows = module.rows(y.detach(), None if context is None else context.detach())
    result = module.acceleration.by_native_code(module.owner, module.library, *rows, is_inverse=True, is_start=True)
    if result is None:
        return None
    x, _ = result
    limit = torch.finfo(y.dtype).max ** 0.5
    return x if all(t is None or bool((t.abs() <= limit).all()) for t in (x, y, context)) else None


def _all_rows(
    y: Float[Tensor, "b d"], context: Float[Tensor, "#b c"] | None
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b c"] | None]:
    return y, None if context is None else context.expand(len(y), -1)


def _batch(y: Tensor, context: Tensor | None) -> torch.Size:
    return y.shape[:-1] if context is None else torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])


def _are_finite(*tensors: Tensor | None) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors if t is not None]).all())
