"""What a TarFlow block keeps while its tokens are solved: a value that is passed in, never held by a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.flows.tarflow.attention import LayerWeights, Parameters, in_dtype


@dataclass(frozen=True)
class TarFlowCache:
    """Keys and values of each layer, and all that does not change while tokens do.

    `layers` are written in place as positions are fed. `embedding`, in causal order, is all that is added to the
    projection of a token: its bias, the embedding of the position and that of the class; (T, C) where it is that of
    every sample. `rows` are 0 .. B-1, `query_scale` is that of `transformer_layer`; `proj_in` is a weight, `proj_out`
    weight and bias. The network runs in the dtype of all these.
    """

    layers: tuple[Float[Tensor, "b 2 h t d"], ...]
    weights: tuple[LayerWeights, ...]
    proj_in: Float[Tensor, "c d"]
    proj_out: Parameters
    embedding: Float[Tensor, "b t c"] | Float[Tensor, "t c"]
    rows: Int[Tensor, "b 1"]
    query_scale: Float[Tensor, "b 1 1 1"] | None

    def each(self, change: Callable[[Tensor], Tensor]) -> TarFlowCache:
        """With `change` made to every tensor that has a row per sample; the rows are counted anew."""
        layers = tuple(change(layer) for layer in self.layers)
        return replace(
            self,
            layers=layers,
            embedding=change(self.embedding) if self.embedding.ndim == 3 else self.embedding,
            rows=self.rows[: len(layers[0])],
            query_scale=None if self.query_scale is None else change(self.query_scale),
        )

    def move(self, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> TarFlowCache:
        """The first `num` rows, after the rows `source` were copied to `target`, in place."""
        for tensor in self._with_rows():
            tensor[target] = tensor[source]
        return self.each(lambda tensor: tensor[:num])

    def refill(self, rows: Int[Tensor, " m"], embedding: Tensor, query_scale: Tensor | None) -> None:
        """Empty the `rows`, in place, for samples with this embedding and scale of queries."""
        for layer in self.layers:
            layer.index_fill_(0, rows, 0)
        if self.embedding.ndim == 3:
            self.embedding[rows] = embedding.to(self.embedding.dtype)
        if self.query_scale is not None and query_scale is not None:
            self.query_scale[rows] = query_scale.to(self.query_scale.dtype)

    def _with_rows(self) -> Iterator[Tensor]:
        yield from self.layers
        if self.embedding.ndim == 3:
            yield self.embedding
        if self.query_scale is not None:
            yield self.query_scale

    def to(self, dtype: torch.dtype) -> TarFlowCache:
        """With all tensors in `dtype`."""
        return replace(
            self.each(lambda tensor: tensor.to(dtype)),
            weights=tuple(layer.to(dtype) for layer in self.weights),
            proj_in=self.proj_in.to(dtype),
            proj_out=in_dtype(self.proj_out, dtype),
            embedding=self.embedding.to(dtype),
        )
