"""One block of a TarFlow: a causal transformer that gives the log-scale and shift of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.flows.base import AttentionContext, FlowBlock, Permutation, ScaleShift, Tokens, check_input
from jacobiflow.flows.config import TarFlowConfig, embed_classes
from jacobiflow.flows.tarflow import recurrence
from jacobiflow.flows.tarflow.attention import (
    AttentionBlock,
    AttentionSpan,
    LayerWeights,
    Parameters,
    cast,
    transformer,
)

_TOKENS_PER_PASS = 3200


@dataclass(frozen=True)
class TarFlowCache:
    """Keys and values of a block's tokens while it is solved, and all that does not change meanwhile.

    The network runs in the dtype of these tensors. `layers` are keys and values, written in place, or none for a pass
    over all tokens; `embedding` is the sum of bias, position and class of each token in causal order; `query_scale` is
    one over the attention temperature of each row, or `None` if all are 1.
    """

    layers: tuple[Float[Tensor, "b 2 h t d"], ...]
    weights: tuple[LayerWeights, ...]
    proj_in: Float[Tensor, "c d"]
    proj_out: Parameters
    embedding: Tokens
    query_scale: Float[Tensor, "b 1 1 1"] | None

    def each(self, change: Callable[[Tensor], Tensor]) -> TarFlowCache:
        """Returns the cache with `change` applied to every tensor that has a row per sample."""
        return replace(
            self,
            layers=tuple(map(change, self.layers)),
            embedding=change(self.embedding),
            query_scale=None if self.query_scale is None else change(self.query_scale),
        )


class TarFlowBlock(FlowBlock):
    """One causal affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    `s` (log-scale) and `u` (shift) come from a causal transformer; its output at position t-1 belongs to entry t, and
    entry 0 has s = u = 0. Tokens are in the block's own causal order throughout: the flow permutes.
    """

    per_sample_front = graph_safe = inference_safe = has_bf16 = has_attention = True
    exact_inverse = recurrence.exact_inverse
    attn_blocks: Sequence[AttentionBlock]

    def __init__(self, config: TarFlowConfig, permutation: Permutation) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        self.nvp = config.nvp
        self.permutation = permutation
        self.proj_in = nn.Linear(config.token_channels, config.channels)
        self.pos_embed = nn.Parameter(torch.randn(config.num_tokens, config.channels) * 1e-2)
        self.class_embed = (
            nn.Parameter(torch.randn(config.num_classes, 1, config.channels) * 1e-2) if config.num_classes else None
        )
        self.attn_blocks = nn.ModuleList(  # type: ignore[assignment]
            AttentionBlock(config.channels, config.head_dim, config.expansion) for _ in range(config.layers_per_block)
        )
        self.proj_out = nn.Linear(config.channels, config.token_channels * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)

    def affine_whole(self, x: Tokens, context: Int[Tensor, " b"] | AttentionContext | None = None) -> ScaleShift:
        return self.affine(x, 0, x.shape[1], self._cache(x, context, layers=()))

    def init_cache(self, z: Tokens, context: Int[Tensor, " b"] | AttentionContext | None = None) -> TarFlowCache:
        check_input(z, self.num_tokens, self.proj_in.in_features)
        attention = self.attn_blocks[0].attention
        weight = attention.qkv.weight
        heads, channels = attention.num_heads, weight.shape[1]
        shape = (z.shape[0], 2, heads, self.num_tokens, channels // heads)
        cache = self._cache(z, context, tuple(weight.new_zeros(shape) for _ in self.attn_blocks))
        return replace(cache, embedding=cache.embedding.contiguous())

    def _cache(self, z: Tensor, context: Tensor | AttentionContext | None, layers: tuple[Tensor, ...]) -> TarFlowCache:
        labels, temperature = AttentionContext.of(context)
        return TarFlowCache(
            layers,
            tuple(layer.weights() for layer in self.attn_blocks),
            self.proj_in.weight,
            (self.proj_out.weight, self.proj_out.bias),
            self._embedding(labels).expand(len(z), -1, -1),
            None if temperature is None else self._query_scale(temperature),
        )

    def _embedding(self, labels: Tensor | None) -> Float[Tensor, "#b t c"]:
        """Bias, positions and classes, to be added to the projections of tokens in causal order."""
        positions = self.permutation(self.pos_embed, dim=0) + self.proj_in.bias
        classes = embed_classes(self.class_embed, labels)
        return positions.unsqueeze(0) if classes is None else positions + classes

    def _query_scale(self, temperature: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        return temperature.to(self.proj_in.weight).reciprocal().view(-1, 1, 1, 1)

    def affine(self, x: Tokens, start: int, stop: int, cache: TarFlowCache) -> ScaleShift:
        size = max(_TOKENS_PER_PASS // (stop - start), 1)
        if len(x) > size and x.device.type == "cpu" and not torch.is_grad_enabled():
            # The activations of few samples stay in reused memory: a fifth less time at 64; see `keep_freed_memory`.
            parts = [slice(first, first + size) for first in range(0, len(x), size)]
            outputs = [self.affine(x[rows], start, stop, cache.each(itemgetter(rows))) for rows in parts]
            log_scales, shifts = zip(*outputs, strict=True)
            return torch.cat(log_scales), torch.cat(shifts)
        if stop == 1:  # entry 0 has no token before it
            return torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
        positions = slice(max(start - 1, 0), stop - 1)
        h = _hidden(x[:, positions], positions, stop - 1, cache)
        return self._read_out(h, x, cache.proj_out, first=start == 0)

    def affine_at(self, x: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: TarFlowCache) -> ScaleShift:
        before = start.view(-1, 1) + torch.arange(-1, size - 1, device=x.device)
        positions = before.clamp(min=0)  # entry 0 has no token before it: it is computed from token 0, and set to zero
        tokens = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        log_scale, shift = self._read_out(_hidden(tokens, positions, end - 1, cache), x, cache.proj_out, first=False)
        first = (before < 0).unsqueeze(-1)
        return log_scale.masked_fill(first, 0), shift.masked_fill(first, 0)

    def move(self, cache: TarFlowCache, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> TarFlowCache:
        def moved(tensor: Tensor) -> Tensor:
            tensor[target] = tensor[source]
            return tensor[:num]

        return cache.each(moved)

    def refill(
        self, cache: TarFlowCache, rows: Int[Tensor, " m"], context: Int[Tensor, " m"] | AttentionContext | None = None
    ) -> None:
        labels, temperature = AttentionContext.of(context)
        for layer in cache.layers:
            layer.index_fill_(0, rows, 0)
        cache.embedding[rows] = self._embedding(labels).to(cache.embedding.dtype)
        if cache.query_scale is not None and temperature is not None:
            cache.query_scale[rows] = self._query_scale(temperature).to(cache.query_scale.dtype)

    def output_weights(self) -> tuple[Float[Tensor, "c d"] | None, Float[Tensor, "c d"]]:
        weight = self.proj_out.weight.detach()
        if not self.nvp:
            return None, weight
        scale, shift = weight.chunk(2)
        return scale, shift

    def row_bytes(self) -> int:
        # Keys, values, embedding, residual stream, norm, hidden units twice, and the causal mask.
        hidden, channels = self.attn_blocks[0].weights().up[0].shape
        values = (2 * len(self.attn_blocks) + 1) * channels + 2 * channels + 2 * hidden + self.num_tokens
        return int(self.num_tokens * values * self.pos_embed.element_size())

    def to_bf16(self, cache: TarFlowCache) -> TarFlowCache:
        dtype = torch.bfloat16
        return replace(
            cache.each(lambda tensor: tensor.to(dtype)),
            weights=tuple(layer.to(dtype) for layer in cache.weights),
            proj_in=cache.proj_in.to(dtype),
            proj_out=cast(cache.proj_out, dtype),
        )

    def _read_out(self, h: Tensor, x: Tensor, proj_out: Parameters, first: bool) -> ScaleShift:
        out = F.linear(h, *proj_out).to(x.dtype)
        if first:
            out = F.pad(out, (0, 0, 1, 0))
        if self.nvp:
            log_scale, shift = out.chunk(2, dim=-1)
            return log_scale, shift
        return torch.zeros_like(out), out


def _hidden(tokens: Tensor, positions: slice | Tensor, end: int, cache: TarFlowCache) -> Tensor:
    """The transformer's output for `tokens` at `positions`, which attend to the positions before `end`."""
    span = AttentionSpan.of(positions, end, cache.proj_in)
    embedding = cache.embedding[:, positions] if span.rows is None else cache.embedding[span.rows, positions]
    h = F.linear(tokens.to(embedding.dtype), cache.proj_in) + embedding
    layers = cache.layers or (None,) * len(cache.weights)
    return transformer(h, list(zip(cache.weights, layers, strict=True)), span, cache.query_scale)
