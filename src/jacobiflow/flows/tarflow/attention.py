"""Causal attention over a preallocated key-value cache that is passed in, never held by a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    def of(cls, positions: slice | Int[Tensor, "b n"], end: int, rows: Int[Tensor, "b 1"], like: Tensor) -> Fed:
        """With a mask, in the dtype and on the device of `like`, only if there is no shorter way to say it."""
        if not isinstance(positions, slice):
            hidden = torch.arange(end, device=like.device) > positions.unsqueeze(-1)
            mask = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
            return cls(positions, end, mask.unsqueeze(1), False, rows)
        size, causal = end - positions.start, positions.start == 0 and end > 1
        own: Tensor | None = None
        if size > 1 and not causal and like.is_cuda:
            own = causal_lower_right(size, end)  # for which a GPU has faster kernels than for a mask in memory
        elif size > 1 and not causal:
            own = like.new_full((size, end), -torch.inf).triu_(positions.start + 1)
        return cls(positions, end, own, causal, rows)


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


def transformer(
    h: Float[Tensor, "b n c"], layers: Sequence[tuple[LayerWeights, Float[Tensor, "b 2 h t d"] | None]],
    fed: Fed | None = None, query_scale: Float[Tensor, "b 1 1 1"] | None = None,
) -> Float[Tensor, "b n c"]:  # fmt: skip
    """Runs `layers`, each its weights and its cache, on `h`. No token's output depends on later tokens.

    That holds even if a later token overflows: keys and values that are not finite are then hidden from the tokens
    before it. A CPU hides them only if the output is not finite, which saves time. A GPU always does, as it would have
    to wait for the answer. With gradients nothing is hidden.
    """

    def run(hide: bool) -> Tensor:
        out = h
        for weights, cache in layers:
            out = transformer_layer(out, weights, cache, fed, query_scale, hide)
        return out

    if h.shape[1] == 1 or torch.is_grad_enabled():
        return run(hide=False)
    if h.device.type == "cpu" and math.isfinite((out := run(hide=False)).sum(dtype=torch.float32)):
        return out
    return run(hide=True)


def transformer_layer(
    x: Float[Tensor, "b n c"], weights: LayerWeights, cache: Float[Tensor, "b 2 h t d"] | None = None,
    fed: Fed | None = None, query_scale: Float[Tensor, "b 1 1 1"] | None = None, hide: bool = False,
) -> Float[Tensor, "b n c"]:  # fmt: skip
    """Pre-norm attention, then a perceptron with GELU, each added to its input.

    Attention is causal over `x` alone, or as `fed` says over `cache`, the keys and values of all T positions, which
    takes those of `x`. `query_scale` divides the logits by each row's attention temperature; `None`: all are 1. With
    `hide`, keys and values that are not finite are 0 to other tokens, and their own token is NaN.
    """
    x = x + _self_attention(x, weights, cache, fed, query_scale, hide)
    return x + _feed_forward(x, weights)


# What these two make on the way is freed where they end, and GELU is in place where no gradient is wanted: less memory
# at a time stays in the processor's caches, 5 per cent of a sweep.


def _self_attention(
    x: Tensor, weights: LayerWeights, cache: Tensor | None, fed: Fed | None, query_scale: Tensor | None, hide: bool
) -> Tensor:
    batch, length, channels = x.shape
    qkv = F.linear(F.layer_norm(x, (channels,), *weights.norm), *weights.qkv)
    qkv = qkv.view(batch, length, 3, weights.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if query_scale is not None:
        q = q * query_scale
    if cache is None or fed is None:
        # Neither a mask nor a weight of 0 hides what is not finite: inf - inf and 0 x inf are NaN.
        keys, values = (k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0)) if hide else (k, v)
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    else:
        new = qkv[:, :, 1:]
        if not isinstance(fed.positions, slice):
            new = new.nan_to_num(0.0, 0.0, 0.0) if hide else new
            cache[fed.rows, :, :, fed.positions] = new.to(cache.dtype)  # which autocast may differ from
        elif hide:
            new = new.permute(0, 2, 3, 1, 4).to(cache.dtype)
            torch.nan_to_num(new, 0.0, 0.0, 0.0, out=cache[:, :, :, fed.positions])
        else:
            cache[:, :, :, fed.positions] = new.permute(0, 2, 3, 1, 4)
        keys, values = cache[:, :, :, : fed.end].unbind(1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=fed.mask, is_causal=fed.causal)
    if hide:
        out = torch.addcmul(out, k, v, value=0)
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
