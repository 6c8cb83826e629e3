"""Causal attention over a preallocated key-value cache that is passed in, never held by a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True)
class Fed:
    """The tokens of one call: where their keys go, and what they attend to.

    **Attributes:**

    - `positions`: a slice common to all rows, or (B, N), a position for each token.
    - `end`: they attend to the positions before it.
    - `mask`: additive, (N, end) or (B, 1, N, end); `None` where `causal` says it all, or a single token attends to all.
    - `causal`: they are all the positions before `end`, each of which attends to itself and those before.
    - `rows`: 0 .. B-1 as (B, 1), beside positions of each token.
    """

    positions: slice | Int[Tensor, "b n"]
    end: int
    mask: Tensor | None
    causal: bool
    rows: Int[Tensor, "b 1"]

    @classmethod
    def of(
        cls, positions: slice | Int[Tensor, "b n"], end: int, mask: Float[Tensor, "t t"], rows: Int[Tensor, "b 1"]
    ) -> Fed:
        """With the rows of the causal `mask` that belong to the positions, where there is no shorter way to say it."""
        if not isinstance(positions, slice):
            return cls(positions, end, mask[positions, :end].unsqueeze(1), False, rows)
        size, causal = end - positions.start, positions.start == 0 and end > 1
        own: Tensor | None = None
        if size > 1 and not causal:
            # On a GPU, attention that is known to be causal has faster kernels than one with a mask in memory.
            own = causal_lower_right(size, end) if mask.is_cuda else mask[positions, :end]
        return cls(positions, end, own, causal, rows)


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
    x: Float[Tensor, "b n c"], weights: LayerWeights, cache: Float[Tensor, "b 2 h t d"] | None = None,
    fed: Fed | None = None, query_scale: Float[Tensor, "b 1 1 1"] | None = None,
) -> Float[Tensor, "b n c"]:  # fmt: skip
    """Pre-norm attention, then a perceptron with GELU, each added to its input.

    Attention is causal over `x` alone, or as `fed` says over `cache`, the keys and values of all T positions, which
    takes those of `x`. `query_scale` divides the logits by each row's attention temperature; `None`: all are 1.
    """
    x = x + _self_attention(x, weights, cache, fed, query_scale)
    return x + _feed_forward(x, weights)


# What these two make on the way is freed where they end, and GELU is in place where no gradient is wanted: less memory
# at a time stays in the processor's caches, 5 per cent of a sweep.


def _self_attention(
    x: Tensor, weights: LayerWeights, cache: Tensor | None, fed: Fed | None, query_scale: Tensor | None
) -> Tensor:
    batch, length, channels = x.shape
    qkv = F.linear(F.layer_norm(x, (channels,), *weights.norm), *weights.qkv)
    qkv = qkv.view(batch, length, 3, weights.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if query_scale is not None:
        q = q * query_scale
    if cache is None or fed is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        if isinstance(fed.positions, slice):
            cache[:, :, :, fed.positions] = qkv[:, :, 1:].permute(0, 2, 3, 1, 4)
        else:
            cache[fed.rows, :, :, fed.positions] = qkv[:, :, 1:].to(cache.dtype)  # which autocast may differ from
        keys, values = cache[:, :, :, : fed.end].unbind(1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=fed.mask, is_causal=fed.causal)
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
    """Parameters of one transformer layer, under the original's names; see `transformer_layer`."""

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
