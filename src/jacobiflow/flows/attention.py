"""Causal attention over a preallocated key-value cache that is passed in, never held by a module."""

from __future__ import annotations

from dataclasses import dataclass

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


class Attention(nn.Module):
    """Pre-norm causal multi-head self-attention: softmax(q k^T / sqrt(head_dim)) v."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.num_heads = channels // head_dim

    def forward(
        self, x: Float[Tensor, "b n c"], cache: KeyValues | None = None, fed: Fed | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attend over `x` alone, or as `fed` says over `cache`, which takes the keys and values of `x`."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
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
        self, x: Float[Tensor, "b n c"], cache: KeyValues | None = None, fed: Fed | None = None
    ) -> Float[Tensor, "b n c"]:
        x = x + self.attention(x, cache, fed)
        return x + self.mlp(x)
