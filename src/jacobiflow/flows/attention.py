"""Causal attention over a preallocated key-value cache that is passed in, never held by a module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one layer at full length T, written in place as positions are fed.

    `keys` and `values` are (B, H, T, D). `mask` is the additive causal mask (T, T), shared by all layers.
    `query_scale` (B, 1, 1, 1) divides the logits by each row's attention temperature; `None` where all are 1.
    """

    keys: Float[Tensor, "b h t d"]
    values: Float[Tensor, "b h t d"]
    mask: Float[Tensor, "t t"]
    query_scale: Float[Tensor, "b 1 1 1"] | None = None


def causal_mask(length: int, like: Tensor) -> Float[Tensor, "t t"]:
    """0 where position i may read position j <= i, -inf elsewhere, in the dtype and on the device of `like`."""
    return torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


class Attention(nn.Module):
    """Pre-norm causal multi-head self-attention: softmax(q k^T / sqrt(head_dim)) v."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.num_heads = channels // head_dim

    def forward(
        self, x: Float[Tensor, "b n c"], cache: KeyValues | None = None, position: int = 0
    ) -> Float[Tensor, "b n c"]:
        """Attend over `x` alone, or with `cache` over its first `position` tokens and `x`, whose keys it stores."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            end = position + length
            cache.keys[:, :, position:end] = k
            cache.values[:, :, position:end] = v
            if cache.query_scale is not None:
                q = q * cache.query_scale
            # A single query reads every key there is: no mask.
            mask = cache.mask[position:end, :end] if length > 1 else None
            out = F.scaled_dot_product_attention(q, cache.keys[:, :, :end], cache.values[:, :, :end], attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Pre-norm two-layer perceptron with GELU."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, channels * expansion), nn.GELU(), nn.Linear(channels * expansion, channels)
        )

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.main(self.norm(x))


class AttentionBlock(nn.Module):
    """One transformer layer: attention, then MLP, each added to its input."""

    def __init__(self, channels: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.mlp = MLP(channels, expansion)

    def forward(
        self, x: Float[Tensor, "b n c"], cache: KeyValues | None = None, position: int = 0
    ) -> Float[Tensor, "b n c"]:
        x = x + self.attention(x, cache, position)
        return x + self.mlp(x)
