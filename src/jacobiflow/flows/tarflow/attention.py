"""Causal attention over a preallocated key-value cache that is passed in, never held by a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class KeyValues:
    """Keys and values (B, H, T, D) of one layer at full length T, written in place as positions are fed."""

    keys: Float[Tensor, "b h t d"]
    values: Float[Tensor, "b h t d"]


@dataclass(frozen=True)
class Fed:
    """The tokens of one call: where their keys go, and what they attend to.

    **Attributes:**

    - `positions`: a slice common to all rows, or (B, N), a position for each token.
    - `end`: they attend to the positions before it.
    - `mask`: additive, (N, end) or (B, 1, N, end); `None` where a single token attends to all of them.
    - `query_scale`: divides the logits by each row's attention temperature; `None` where all are 1.
    """

    positions: slice | Int[Tensor, "b n"]
    end: int
    mask: Tensor | None
    query_scale: Float[Tensor, "b 1 1 1"] | None = None

    @classmethod
    def of(
        cls, positions: slice | Int[Tensor, "b n"], end: int, mask: Float[Tensor, "t t"], query_scale: Tensor | None
    ) -> Fed:
        """With the rows of the causal `mask` that belong to the positions."""
        if isinstance(positions, slice):
            # A single query reads every key there is: no mask.
            rows = mask[positions, :end] if end - positions.start > 1 else None
        else:
            rows = mask[positions, :end].unsqueeze(1)
        return cls(positions, end, rows, query_scale)


def causal_mask(length: int, like: Tensor) -> Float[Tensor, "t t"]:
    """0 where position i may read position j <= i, -inf elsewhere, in the dtype and on the device of `like`."""
    return torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


Parameters = tuple[Tensor, Tensor]  # weight and bias


class LayerWeights(NamedTuple):
    """The parameters of one transformer layer, at hand without a module in between: a step over a few tokens is short.

    Weights and biases of the norm before attention, the packed projections of queries, keys and values, the projection
    of its output, the norm before the perceptron, and its two layers.
    """

    norm: Parameters
    qkv: Parameters
    proj: Parameters
    mlp_norm: Parameters
    up: Parameters
    down: Parameters
    num_heads: int

    def to(self, dtype: torch.dtype) -> LayerWeights:
        """In `dtype`."""
        norm, qkv, proj, mlp_norm, up, down = (in_dtype(pair, dtype) for pair in self[:-1])
        return LayerWeights(norm, qkv, proj, mlp_norm, up, down, self.num_heads)


def in_dtype(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """Weight and bias in `dtype`."""
    weight, bias = parameters
    return weight.to(dtype), bias.to(dtype)


def transformer_layer(
    x: Float[Tensor, "b n c"], weights: LayerWeights, cache: KeyValues | None = None, fed: Fed | None = None
) -> Float[Tensor, "b n c"]:
    """Pre-norm attention, then a perceptron with GELU, each added to its input.

    Attention is causal over `x` alone, or as `fed` says over `cache`, which takes the keys and values of `x`.
    """
    x = x + _self_attention(x, weights, cache, fed)
    return x + _feed_forward(x, weights)


# What these two make on the way is freed where they end, and GELU is in place where no gradient is wanted: less memory
# at a time stays in the processor's caches, 5 per cent of a sweep.


def _self_attention(x: Tensor, weights: LayerWeights, cache: KeyValues | None, fed: Fed | None) -> Tensor:
    batch, length, channels = x.shape
    qkv = F.linear(F.layer_norm(x, (channels,), *weights.norm), *weights.qkv)
    q, k, v = qkv.view(batch, length, 3, weights.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if cache is None or fed is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        if isinstance(fed.positions, slice):
            cache.keys[:, :, fed.positions] = k
            cache.values[:, :, fed.positions] = v
        else:
            rows = torch.arange(batch, device=x.device).view(-1, 1)
            cache.keys[rows, :, fed.positions] = k.transpose(1, 2)
            cache.values[rows, :, fed.positions] = v.transpose(1, 2)
        if fed.query_scale is not None:
            q = q * fed.query_scale
        keys, values = cache.keys[:, :, : fed.end], cache.values[:, :, : fed.end]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=fed.mask)
    return F.linear(out.transpose(1, 2).reshape(batch, length, channels), *weights.proj)


def _feed_forward(x: Tensor, weights: LayerWeights) -> Tensor:
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], *weights.mlp_norm), *weights.up)
    hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
    return F.linear(hidden, *weights.down)


class Attention(nn.Module):
    """Parameters of multi-head self-attention, under the original's names; see `transformer_layer`."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.num_heads = channels // head_dim


class MLP(nn.Module):
    """Parameters of the two-layer perceptron, under the original's names; see `transformer_layer`."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, channels * expansion), nn.GELU(), nn.Linear(channels * expansion, channels)
        )


class AttentionBlock(nn.Module):
    """One transformer layer: attention, then MLP, each added to its input."""

    def __init__(self, channels: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.mlp = MLP(channels, expansion)

    def weights(self) -> LayerWeights:
        """The parameters as `transformer_layer` takes them."""
        attention, mlp = self.attention, self.mlp
        norm, qkv, proj, mlp_norm, up, down = (
            (module.weight, module.bias)
            for module in (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.main[0], mlp.main[2])
        )
        return LayerWeights(norm, qkv, proj, mlp_norm, up, down, attention.num_heads)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return transformer_layer(x, self.weights())
