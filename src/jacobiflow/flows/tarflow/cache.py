"""What a TarFlow block keeps while its tokens are solved: a value that is passed in, never held by a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.flows.tarflow.attention import KeyValues, LayerWeights, Parameters, in_dtype


@dataclass(frozen=True)
class TarFlowCache:
    """One `KeyValues` a layer, and all that does not change while tokens do.

    `pos_embedding` is in causal order, `mask` the additive causal mask, `query_scale` see `Fed`; `proj_in` and
    `proj_out` are weight and bias of these projections. The network runs in the dtype of all these.
    """

    layers: tuple[KeyValues, ...]
    weights: tuple[LayerWeights, ...]
    proj_in: Parameters
    proj_out: Parameters
    pos_embedding: Float[Tensor, "t c"]
    class_embedding: Float[Tensor, "b 1 c"] | None
    mask: Float[Tensor, "t t"]
    query_scale: Float[Tensor, "b 1 1 1"] | None

    def each(self, change: Callable[[Tensor], Tensor]) -> TarFlowCache:
        """With `change` made to every tensor that has a row per sample."""
        return replace(
            self,
            layers=tuple(KeyValues(change(kv.keys), change(kv.values)) for kv in self.layers),
            class_embedding=None if self.class_embedding is None else change(self.class_embedding),
            query_scale=None if self.query_scale is None else change(self.query_scale),
        )

    @staticmethod
    def join(caches: Sequence[TarFlowCache]) -> TarFlowCache:
        """One cache with the rows of all."""
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return replace(
            caches[0],
            layers=tuple(
                KeyValues(torch.cat([kv.keys for kv in parts]), torch.cat([kv.values for kv in parts]))
                for parts in layers
            ),
            class_embedding=_cat([cache.class_embedding for cache in caches]),
            query_scale=_cat([cache.query_scale for cache in caches]),
        )

    def to(self, dtype: torch.dtype) -> TarFlowCache:
        """With all tensors in `dtype`."""
        return replace(
            self.each(lambda tensor: tensor.to(dtype)),
            weights=tuple(layer.to(dtype) for layer in self.weights),
            proj_in=in_dtype(self.proj_in, dtype),
            proj_out=in_dtype(self.proj_out, dtype),
            pos_embedding=self.pos_embedding.to(dtype),
            mask=self.mask.to(dtype),
        )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
