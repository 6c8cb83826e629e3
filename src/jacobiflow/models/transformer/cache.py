"""The cache of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import ScaleShift
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.models.transformer.attention import LayerWeights, WeightBias, cast_tensors


class Projections(NamedTuple):
    """The parameters of a block before and after its layers.

    Attributes:
        final_norm: Multiplies the normalised output of the last layer; `None` without normalisation.
    """

    proj_in: Float[Tensor, "w c"]
    proj_out: WeightBias
    final_norm: Float[Tensor, " w"] | None


@dataclass(frozen=True)
class TransformerCache:
    """Keys and values of a block's tokens while it is solved, and the parameters, which stay as they are.

    The network runs in the dtype of these tensors.

    Attributes:
        layers: Keys and values, written in place.
        weights: The parameters of each layer.
        embedding: The sum of bias, position and context of each token in causal order.
        query_scale: One over the attention temperature of each row; `None` if all are 1.
        entry0_params: Log-scale and shift of entry 0: computed from the prefix, 0 without one.
    """

    layers: tuple[Float[Tensor, "b 2 h t d"], ...]
    weights: tuple[LayerWeights, ...]
    projections: Projections
    embedding: Tokens
    query_scale: Float[Tensor, "b 1 1 1"] | None
    entry0_params: ScaleShift

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> TransformerCache:
        """Returns the cache with `change` applied to every tensor that has a row per sample."""
        log_scale, shift = self.entry0_params
        return replace(
            self,
            layers=tuple(map(change, self.layers)),
            embedding=change(self.embedding),
            query_scale=None if self.query_scale is None else change(self.query_scale),
            entry0_params=(change(log_scale), change(shift)),
        )

    def entry0(self, dtype: torch.dtype) -> ScaleShift:
        """Returns log-scale and shift of entry 0, in the dtype of the tokens."""
        log_scale, shift = self.entry0_params
        return log_scale.to(dtype), shift.to(dtype)

    def to(self, dtype: torch.dtype) -> TransformerCache:
        """Returns a copy with which the network runs in `dtype`."""
        return replace(
            self.map_rows(lambda tensor: tensor.to(dtype)),
            weights=cast_tensors(self.weights, dtype),
            projections=cast_tensors(self.projections, dtype),
        )
