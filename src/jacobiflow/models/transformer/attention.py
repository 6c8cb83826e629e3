"""Causal attention over a key-value cache that the caller allocates and passes in."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from jacobiflow.blocks.tokens import Tokens

_EXPLICIT_TOKENS = 400
"""In bfloat16 on a CPU, attention to at most this many tokens is computed by products of matrices if it has a gradient.
With more tokens PyTorch's kernel does, which keeps no matrix of tokens by tokens."""


@dataclass(frozen=True)
class AttentionSpan:
    """The tokens of one pass, and the positions that they attend to.

    Attributes:
        positions: The positions of the tokens: a slice, or (B, N) with those of each row.
        end: Tokens attend to positions before `end` only.
        mask: Is added to the attention logits; `None` if no token has a later one before `end`, or all are tokens.
        is_causal: The tokens are all the positions before `end`.
        rows: 0 .. B-1, for positions (B, N).
    """

    positions: slice | Int[Tensor, "b n"]
    end: int
    mask: Tensor | None
    is_causal: bool
    rows: Int[Tensor, "b 1"] | None = None

    @classmethod
    def of(cls, positions: slice | Int[Tensor, "b n"], end: int, like: Tensor, prefix_length: int = 0) -> AttentionSpan:
        """Returns the span of tokens after a prefix, with a mask in the dtype of `like` only if it needs one."""
        end += prefix_length
        if isinstance(positions, slice):
            positions = slice(prefix_length + positions.start, prefix_length + positions.stop)
        else:
            positions = positions + prefix_length
            is_later = torch.arange(end, device=like.device) > positions.unsqueeze(-1)
            mask = torch.zeros_like(is_later, dtype=like.dtype).masked_fill_(is_later, -torch.inf)
            rows = torch.arange(len(positions), device=like.device).view(-1, 1)
            return cls(positions, end, mask.unsqueeze(1), False, rows)
        size, is_causal = end - positions.start, positions.start == 0 and end > 1
        if size == 1 or is_causal:
            return cls(positions, end, None, is_causal)
        if like.is_cuda:  # The flash kernel of CUDA takes this bias, but no mask.
            return cls(positions, end, causal_lower_right(size, end), False)
        return cls(positions, end, like.new_full((size, end), -torch.inf).triu_(positions.start + 1), False)


WeightBias = tuple[Tensor, Tensor]
"""A weight and a bias."""


class AdaptiveModulation(NamedTuple):
    """The adaptive parameters of a layer of Prose: factors and shifts of normalised tokens, by position."""

    scale: Float[Tensor, "t w"]
    shift: Float[Tensor, "t w"]
    gate: Float[Tensor, "t w"]
    gated_scale: Float[Tensor, "t w"]
    gated_shift: Float[Tensor, "t w"]
    gated_gate: Float[Tensor, "t w"]
    gated_up: Float[Tensor, "h2 w"]
    gated_down: Float[Tensor, "w h"]


class Rotation(NamedTuple):
    """Rotary position embedding: the cosine and sine of each pair of a query's or key's channels, by position."""

    cos: Float[Tensor, "t d2"]
    sin: Float[Tensor, "t d2"]

    def __call__(self, x: Float[Tensor, "b n k h d"], positions: slice | Tensor) -> Float[Tensor, "b n k h d"]:
        """Rotates the vectors of tokens at these positions."""
        cos, sin = (table[positions].unsqueeze(-2).unsqueeze(-2) for table in self)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    def pairs(self) -> Float[Tensor, "t d"]:
        """Returns the cosine and the sine of each pair side by side."""
        return torch.stack(tuple(self), dim=-1).flatten(-2)


class SharedParameters(NamedTuple):
    """Parameters by position that all layers of a block share: a rotation, and a vector for each token."""

    rotation: Rotation | None = None
    condition: Float[Tensor, "t w"] | None = None


class LayerWeights(NamedTuple):
    """The parameters of one transformer layer.

    They are read from the modules once for many passes, since reading them takes long beside a pass over few tokens.
    `query_norm` and `key_norm` are over all heads together. `condition` is added to the layer's input by position.
    """

    norm: WeightBias
    qkv: WeightBias
    proj: WeightBias
    mlp_norm: WeightBias
    up: WeightBias
    down: WeightBias
    num_heads: int
    query_norm: WeightBias | None = None
    key_norm: WeightBias | None = None
    condition: Float[Tensor, "t w"] | None = None
    adaptive: AdaptiveModulation | None = None
    rotation: Rotation | None = None

    def named(self) -> dict[str, Tensor]:
        """Returns the parameters by their names in native code."""
        named: dict[str, Tensor] = {} if self.condition is None else {"condition": self.condition}
        for name in ("norm", "qkv", "proj", "mlp_norm", "up", "down", "query_norm", "key_norm"):
            parameters = getattr(self, name)
            if parameters is not None:
                named[name], named[f"{name}_bias"] = parameters
        return named if self.adaptive is None else named | self.adaptive._asdict()


def cast_tensors(parameters: Any, dtype: torch.dtype) -> Any:
    """Converts the tensors in a tuple of tensors and tuples to `dtype`."""
    if isinstance(parameters, Tensor):
        return parameters.to(dtype)
    if not isinstance(parameters, tuple):
        return parameters
    parts = [cast_tensors(part, dtype) for part in parameters]
    return type(parameters)(*parts) if hasattr(parameters, "_fields") else tuple(parts)


def run_layers(h: Tokens, layers: Sequence[Callable[[Tokens, bool], Tokens]]) -> Tokens:
    """Runs transformer layers on `h`; no token's output depends on later tokens, even if these overflow.

    Non-finite keys and values are 0 to other tokens, and make their own token's output NaN. A CPU replaces them only if
    the output is not finite, which saves time. A GPU always replaces them, which saves a synchronisation. With
    gradients they are not replaced.

    Args:
        layers: Functions that run one layer each, and replace non-finite keys and values if the flag is set.
    """

    def run(hide_nonfinite: bool) -> Tensor:
        out = h
        for layer in layers:
            out = layer(out, hide_nonfinite)
        return out

    if h.shape[1] == 1 or torch.is_grad_enabled():
        return run(hide_nonfinite=False)
    if h.device.type == "cpu" and math.isfinite((out := run(hide_nonfinite=False)).sum(dtype=torch.float32)):
        return out
    return run(hide_nonfinite=True)


def run_layer(
    x: Tokens, weights: LayerWeights, cache: Float[Tensor, "b 2 h t d"] | None, span: AttentionSpan,
    query_scale: Float[Tensor, "b 1 1 1"] | None, hide_nonfinite: bool,
) -> Tokens:  # fmt: skip
    """Runs a layer on the tokens of a span.

    Args:
        cache: Keys and values of the layer; `None` if `x` are all tokens.
        query_scale: One over the attention temperature of each row.
        hide_nonfinite: Whether non-finite keys and values are 0 to other tokens.
    """
    adaptive = weights.adaptive
    out = x if weights.condition is None else x + weights.condition[span.positions]
    if adaptive is not None:
        out = _modulate(x, adaptive.scale[span.positions], adaptive.shift[span.positions])
    out = out + _attend(out, weights, cache, span, query_scale, hide_nonfinite)
    out = out + _feed_forward(out, weights)
    if adaptive is None:
        return out
    x = x + adaptive.gate[span.positions] * out
    modulated = _modulate(x, adaptive.gated_scale[span.positions], adaptive.gated_shift[span.positions])
    values, gates = F.linear(modulated, adaptive.gated_up).chunk(2, dim=-1)
    return x + adaptive.gated_gate[span.positions] * F.linear(F.silu(gates) * values, adaptive.gated_down)


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale * F.layer_norm(x, x.shape[-1:]) + shift


# Each function frees its intermediate tensors when it returns, and GELU is in place without gradients. So the memory in
# use is more likely to stay in the processor's caches.


def _attend(
    x: Tensor, weights: LayerWeights, cache: Tensor | None, span: AttentionSpan, query_scale: Tensor | None,
    hide_nonfinite: bool,
) -> Tensor:  # fmt: skip
    """Returns the output of self-attention, before the residual sum; writes keys and values to the cache."""
    qkv = _project_qkv(x, weights, span.positions)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if query_scale is not None:
        query = query * query_scale
    if cache is None:
        keys, values = (_replace_nonfinite(key), _replace_nonfinite(value)) if hide_nonfinite else (key, value)
        out = _causal_attention(query, keys, values)
    else:
        _write_cache(cache, qkv[:, :, 1:], span, hide_nonfinite)
        keys, values = cache[:, :, :, : span.end].unbind(1)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=span.mask, is_causal=span.is_causal)
    if hide_nonfinite or x.device.type == "cpu":
        # This is NaN for a token whose own key or value is not finite. Without it kernels for AVX-512 return 0 if all
        # keys of a short span are non-finite. Its gradient would be 0.
        out = torch.addcmul(out, key.detach(), value.detach(), value=0)
    return F.linear(out.transpose(1, 2).reshape(x.shape), *weights.proj)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "b h t d"]:
    """Returns the values of all tokens (B, heads, T, head_dim), each averaged over it and those before."""
    num, is_bf16 = query.shape[2], query.dtype == torch.bfloat16
    if query.is_cuda or not is_bf16 or not torch.is_grad_enabled() or num > _EXPLICIT_TOKENS:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = query.new_full((num, num), -torch.inf).triu_(1)
    q, k, v = (heads.flatten(0, 1) for heads in (query, key, value))
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.bmm(weights, v).unflatten(0, query.shape[:2])


def _project_qkv(x: Tensor, weights: LayerWeights, positions: slice | Tensor) -> Float[Tensor, "b n 3 h d"]:
    """Returns queries, keys and values of each head, normalised and rotated if the layer does that."""
    batch, length, width = x.shape
    qkv = F.linear(F.layer_norm(x, (width,), *weights.norm), *weights.qkv)
    if weights.query_norm is not None and weights.key_norm is not None:
        query, key, value = qkv.chunk(3, dim=-1)
        query = F.layer_norm(query, (width,), *weights.query_norm)
        qkv = torch.cat((query, F.layer_norm(key, (width,), *weights.key_norm), value), dim=-1)
    qkv = qkv.view(batch, length, 3, weights.num_heads, -1)
    if weights.rotation is not None:
        qkv = torch.cat((weights.rotation(qkv[:, :, :2], positions), qkv[:, :, 2:]), dim=2)
    return qkv


def _write_cache(
    cache: Float[Tensor, "b 2 h t d"], new: Float[Tensor, "b n 2 h d"], span: AttentionSpan, hide_nonfinite: bool
) -> None:
    """Writes keys and values to the positions of the span; under autocast they may have another dtype."""
    if not isinstance(span.positions, slice):
        new = _replace_nonfinite(new) if hide_nonfinite else new
        cache[span.rows, :, :, span.positions] = new.to(cache.dtype)
        return
    new, target = new.permute(0, 2, 3, 1, 4), cache[:, :, :, span.positions]
    if hide_nonfinite:
        torch.nan_to_num(new.to(cache.dtype), 0.0, 0.0, 0.0, out=target)
    else:
        target.copy_(new)


def _replace_nonfinite(tensor: Tensor) -> Tensor:
    """Replaces NaN and infinity by 0. A mask or a weight of 0 would not hide them: inf - inf and 0 x inf are NaN."""
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def _feed_forward(x: Tensor, weights: LayerWeights) -> Tensor:
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], *weights.mlp_norm), *weights.up)
    hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
    return F.linear(hidden, *weights.down)


class Attention(nn.Module):
    """Parameters of multi-head self-attention, under the original's names."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, width * 3)
        self.proj = nn.Linear(width, width)
        self.num_heads = width // head_dim


class MLP(nn.Module):
    """Parameters of the two-layer perceptron, under the original's names."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, width * expansion), nn.GELU(), nn.Linear(width * expansion, width))


class Layer(nn.Module):
    """The parameters of one layer.

    Until the module is called they may be sharded over processes. Its call runs a function that reads them, after the
    hooks of PyTorch's FSDP.
    """

    @abstractmethod
    def weights(self, shared: SharedParameters) -> LayerWeights:
        """Returns the parameters as `run_layer` takes them."""

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(x)


class TransformerLayer(Layer):
    """Parameters of one transformer layer, under the original's names."""

    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width, expansion)

    def weights(self, shared: SharedParameters) -> LayerWeights:
        attention, mlp = self.attention, self.mlp
        norm, qkv, proj, mlp_norm, up, down = (
            (module.weight, module.bias)
            for module in (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.main[0], mlp.main[2])
        )
        return LayerWeights(
            norm, qkv, proj, mlp_norm, up, down, attention.num_heads,  # type: ignore[arg-type]
            condition=shared.condition, rotation=shared.rotation,
        )  # fmt: skip
