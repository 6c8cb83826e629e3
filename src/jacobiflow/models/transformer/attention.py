"""Causal attention over a preallocated key-value cache that is passed in, never held by a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True)
class AttentionSpan:
    """The tokens of one pass: their positions, a slice or (B, N), and the additive mask by which they attend."""

    positions: slice | Int[Tensor, "b n"]
    end: int
    mask: Tensor | None
    causal: bool  # they are all the positions before `end`
    rows: Int[Tensor, "b 1"] | None = None  # 0 .. B-1, for positions (B, N)

    @classmethod
    def of(cls, positions: slice | Int[Tensor, "b n"], end: int, like: Tensor) -> AttentionSpan:
        """Returns a span, with a mask in the dtype and on the device of `like` only if it needs one."""
        if not isinstance(positions, slice):
            hidden = torch.arange(end, device=like.device) > positions.unsqueeze(-1)
            mask = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
            rows = torch.arange(len(positions), device=like.device).view(-1, 1)
            return cls(positions, end, mask.unsqueeze(1), False, rows)
        size, causal = end - positions.start, positions.start == 0 and end > 1
        if size == 1 or causal:
            return cls(positions, end, None, causal)
        if like.is_cuda:
            return cls(positions, end, causal_lower_right(size, end), False)  # which has faster kernels than a mask
        return cls(positions, end, like.new_full((size, end), -torch.inf).triu_(positions.start + 1), False)


Parameters = tuple[Tensor, Tensor]  # weight and bias


class Adaptive(NamedTuple):
    """The parameters that make a layer Prose's: what multiplies and is added to normalised tokens, by position."""

    scale: Float[Tensor, "t c"]
    shift: Float[Tensor, "t c"]
    gate: Float[Tensor, "t c"]
    gated_scale: Float[Tensor, "t c"]
    gated_shift: Float[Tensor, "t c"]
    gated_gate: Float[Tensor, "t c"]
    gated_up: Float[Tensor, "h2 c"]
    gated_down: Float[Tensor, "c h"]


class Rotation(NamedTuple):
    """Cosines and sines by which rotary position embedding turns each pair of a query's or key's channels."""

    cos: Float[Tensor, "t d2"]
    sin: Float[Tensor, "t d2"]

    def __call__(self, x: Float[Tensor, "b n k h d"], positions: slice | Tensor) -> Float[Tensor, "b n k h d"]:
        """Turns the vectors of tokens at these positions."""
        cos, sin = (table[positions].unsqueeze(-2).unsqueeze(-2) for table in self)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    def pairs(self) -> Float[Tensor, "t d"]:
        """Returns the cosine and the sine of each pair side by side."""
        return torch.stack(tuple(self), dim=-1).flatten(-2)


class LayerWeights(NamedTuple):
    """The parameters of one transformer layer, read from its modules once: a step over a few tokens is short.

    `query_norm` and `key_norm` are over all heads together. `condition` is added to the layer's input by position.
    """

    norm: Parameters
    qkv: Parameters
    proj: Parameters
    mlp_norm: Parameters
    up: Parameters
    down: Parameters
    num_heads: int
    query_norm: Parameters | None = None
    key_norm: Parameters | None = None
    condition: Float[Tensor, "t c"] | None = None
    adaptive: Adaptive | None = None
    rotation: Rotation | None = None

    def named(self) -> dict[str, Tensor]:
        """Returns the parameters by their names in native code."""
        entries = self._asdict()
        pairs = {name: pair for name, pair in entries.items() if type(pair) is tuple}
        named = {
            name + end: tensor for name, pair in pairs.items() for end, tensor in zip(("", "_bias"), pair, strict=True)
        }
        named |= {} if self.condition is None else {"condition": self.condition}
        return named | ({} if self.adaptive is None else self.adaptive._asdict())


def cast(parameters: Any, dtype: torch.dtype) -> Any:
    """Converts the tensors in a tuple of tensors and tuples to `dtype`."""
    if isinstance(parameters, Tensor):
        return parameters.to(dtype)
    if not isinstance(parameters, tuple):
        return parameters
    parts = [cast(part, dtype) for part in parameters]
    return type(parameters)(*parts) if hasattr(parameters, "_fields") else tuple(parts)


def transformer(
    h: Float[Tensor, "b n c"], layers: Sequence[tuple[LayerWeights, Float[Tensor, "b 2 h t d"] | None]],
    span: AttentionSpan, query_scale: Float[Tensor, "b 1 1 1"] | None,
) -> Float[Tensor, "b n c"]:  # fmt: skip
    """Runs layers on `h`; no token's output depends on later tokens, even if these overflow.

    Keys and values that are not finite are 0 to other tokens, and NaN to their own. A CPU hides them only if the output
    is not finite, which saves time. A GPU always does, to save a synchronisation. With gradients nothing is hidden.

    With caches of `None`, `h` are all tokens. `query_scale` is one over the attention temperature of each row.
    """

    def run(hide: bool) -> Tensor:
        out = h
        for weights, cache in layers:
            out = _layer(out, weights, cache, span, query_scale, hide)
        return out

    if h.shape[1] == 1 or torch.is_grad_enabled():
        return run(hide=False)
    if h.device.type == "cpu" and math.isfinite((out := run(hide=False)).sum(dtype=torch.float32)):
        return out
    return run(hide=True)


def _layer(
    x: Tensor, weights: LayerWeights, cache: Tensor | None, span: AttentionSpan, query_scale: Tensor | None, hide: bool
) -> Tensor:
    adaptive = weights.adaptive
    out = x if weights.condition is None else x + weights.condition[span.positions]
    if adaptive is not None:
        out = _modulate(x, adaptive.scale[span.positions], adaptive.shift[span.positions])
    out = out + _self_attention(out, weights, cache, span, query_scale, hide)
    out = out + _feed_forward(out, weights)
    if adaptive is None:
        return out
    x = x + adaptive.gate[span.positions] * out
    modulated = _modulate(x, adaptive.gated_scale[span.positions], adaptive.gated_shift[span.positions])
    values, gates = F.linear(modulated, adaptive.gated_up).chunk(2, dim=-1)
    return x + adaptive.gated_gate[span.positions] * F.linear(F.silu(gates) * values, adaptive.gated_down)


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale * F.layer_norm(x, x.shape[-1:]) + shift


# Two functions, whose intermediate tensors are freed at their ends, and GELU in place without gradients: what memory is
# in use stays in the processor's caches, which saves 5 per cent of a sweep.


def _self_attention(
    x: Tensor, weights: LayerWeights, cache: Tensor | None, span: AttentionSpan, query_scale: Tensor | None, hide: bool
) -> Tensor:
    batch, length, channels = x.shape
    qkv = F.linear(F.layer_norm(x, (channels,), *weights.norm), *weights.qkv)
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key, value = qkv.chunk(3, dim=-1)
        query = F.layer_norm(query, (channels,), *weights.query_norm)
        qkv = torch.cat((query, F.layer_norm(key, (channels,), *weights.key_norm), value), dim=-1)
    qkv = qkv.view(batch, length, 3, weights.num_heads, -1)
    if weights.rotation is not None:
        qkv = torch.cat((weights.rotation(qkv[:, :, :2], span.positions), qkv[:, :, 2:]), dim=2)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if query_scale is not None:
        q = q * query_scale
    if cache is None:
        # Neither a mask nor a weight of 0 hides a value that is not finite: inf - inf and 0 x inf are NaN.
        keys, values = (k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0)) if hide else (k, v)
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    else:
        new = qkv[:, :, 1:]
        if not isinstance(span.positions, slice):
            new = new.nan_to_num(0.0, 0.0, 0.0) if hide else new
            cache[span.rows, :, :, span.positions] = new.to(cache.dtype)  # which autocast may differ from
        elif hide:
            new = new.permute(0, 2, 3, 1, 4).to(cache.dtype)
            torch.nan_to_num(new, 0.0, 0.0, 0.0, out=cache[:, :, :, span.positions])
        else:
            cache[:, :, :, span.positions] = new.permute(0, 2, 3, 1, 4)
        keys, values = cache[:, :, :, : span.end].unbind(1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=span.mask, is_causal=span.causal)
    if hide or x.device.type == "cpu":
        # NaN for a token whose own key or value is not finite. Kernels for AVX-512 give 0 if no key of a short span is.
        out = torch.addcmul(out, k, v, value=0)
    return F.linear(out.transpose(1, 2).reshape(batch, length, channels), *weights.proj)


def _feed_forward(x: Tensor, weights: LayerWeights) -> Tensor:
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], *weights.mlp_norm), *weights.up)
    hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
    return F.linear(hidden, *weights.down)


class Attention(nn.Module):
    """Parameters of multi-head self-attention, under the original's names."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)
        self.num_heads = channels // head_dim


class MLP(nn.Module):
    """Parameters of the two-layer perceptron, under the original's names."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, channels * expansion), nn.GELU(), nn.Linear(channels * expansion, channels)
        )


class AttentionBlock(nn.Module):
    """Parameters of one transformer layer, under the original's names."""

    def __init__(self, channels: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_dim)
        self.mlp = MLP(channels, expansion)

    def weights(self) -> LayerWeights:
        """Returns the parameters as `transformer` takes them."""
        attention, mlp = self.attention, self.mlp
        norm, qkv, proj, mlp_norm, up, down = (
            (module.weight, module.bias)
            for module in (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.main[0], mlp.main[2])
        )
        return LayerWeights(norm, qkv, proj, mlp_norm, up, down, attention.num_heads)  # type: ignore[arg-type]
