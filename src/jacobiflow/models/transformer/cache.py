"""The cache of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import ScaleShift
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.models.transformer.attention import LayerWeights, LazyLayer, Parameters, cast_tensors


@dataclass(frozen=True)
class TransformerCache:
    """Keys and values of a block's tokens while it is solved, and the parameters, which stay as they are.

    The network runs in the dtype of these tensors.

    Attributes:
        layers: Keys and values, written in place; empty for a pass over all tokens.
        embedding: The sum of bias, position and context of each token in causal order.
        query_scale: One over the attention temperature of each row; `None` if all are 1.
        final_norm: Multiplies the normalised output of the last layer; `None` without normalisation.
        prefix: Embeddings of the prefix, for a pass over all tokens.
        entry0_params: Log-scale and shift of entry 0, computed from the prefix; `None` if they are 0.
    """

    layers: tuple[Float[Tensor, "b 2 h t d"], ...]
    weights: tuple[LayerWeights | LazyLayer, ...]
    proj_in: Float[Tensor, "c d"]
    proj_out: Parameters
    embedding: Tokens
    query_scale: Float[Tensor, "b 1 1 1"] | None
    final_norm: Float[Tensor, " c"] | None = None
    prefix: Float[Tensor, "b p c"] | None = None
    entry0_params: ScaleShift | None = None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> TransformerCache:
        """Returns the cache with `change` applied to every tensor that has a row per sample."""
        params = self.entry0_params
        return replace(
            self,
            layers=tuple(map(change, self.layers)),
            embedding=change(self.embedding),
            query_scale=None if self.query_scale is None else change(self.query_scale),
            prefix=None if self.prefix is None else change(self.prefix),
            entry0_params=None if params is None else (change(params[0]), change(params[1])),
        )

    def to(self, dtype: torch.dtype) -> TransformerCache:
        """Returns a copy with which the network runs in `dtype`."""
        return replace(
            self.map_rows(lambda tensor: tensor.to(dtype)),
            weights=cast_tensors(self.weights, dtype),
            proj_in=self.proj_in.to(dtype),
            proj_out=cast_tensors(self.proj_out, dtype),
            final_norm=cast_tensors(self.final_norm, dtype),
        )
