"""zuko: `MaskedAutoregressiveTransform`, of which MAF, NSF, NCSF, NAF, UNAF, SOSPF and BPF are made."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear
from zuko.transforms import AutoregressiveTransform

from jacobiflow.adapters.fixed_point import invert
from jacobiflow.adapters.network import needs_all_passes, needs_graph, premasked
from jacobiflow.adapters.swapped import Adapter, Swapped


class Accelerated(Swapped):
    """A lazy transformation whose transform, at a context, has the parallel inverse."""

    meta: Any
    passes: int

    def forward(self, c: Tensor | None = None) -> ParallelInverse:
        return ParallelInverse(self, c)


class ParallelInverse(AutoregressiveTransform):  # type: ignore[misc]
    """zuko's transform x -> y at a context, whose inverse ends where further passes would change nothing."""

    def __init__(self, module: Accelerated, context: Float[Tensor, "*batch c"] | None) -> None:
        super().__init__(partial(module.meta, context), module.passes)
        self.module, self.context, self.acceleration = module, context, module.acceleration

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        module, context, tolerance = self.module, self.context, self.acceleration.tolerance
        graph = needs_graph(module, y, context)
        if needs_all_passes(module, y, self.passes, graph):
            self.acceleration.count(module, self.passes)
            return super()._inverse(y)
        shape = y.shape[:-1] if context is None else torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])
        if tolerance > 0:  # rows of one batch, which may leave it
            y, context = _rows(y, shape), None if context is None else _rows(context, shape)
        cheaper = premasked(module, MaskedLinear)

        def step(x: Tensor, y: Tensor, context: Tensor | None) -> tuple[Tensor]:
            transform = module if torch.is_grad_enabled() else cheaper
            return (transform.meta(context, x).inv(y),)

        (x,), passes = invert(step, y, context, self.passes, tolerance, graph)
        self.acceleration.count(module, passes)
        return x if tolerance == 0 else x.reshape(*shape, x.shape[-1])


def _rows(x: Float[Tensor, "*batch d"], shape: torch.Size) -> Float[Tensor, "b d"]:
    """`x` for a batch of that shape, as rows."""
    return x.expand(*shape, x.shape[-1]).reshape(shape.numel(), x.shape[-1])


ADAPTER = Adapter(MaskedAutoregressiveTransform, "forward", Accelerated)
