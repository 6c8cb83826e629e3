"""Blocks whose log-scales and shifts come from a causal transformer, and that of a TarFlow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.flows.base import (
    AttentionContext,
    FlowBlock,
    Permutation,
    ScaleShift,
    Tokens,
    check_context,
    check_input,
)
from jacobiflow.flows.config import TarFlowConfig, TokenConfig, embed_classes
from jacobiflow.flows.guidance import Guidance
from jacobiflow.flows.tarflow.attention import (
    AttentionBlock,
    AttentionSpan,
    LayerWeights,
    Parameters,
    cast,
    transformer,
)
from jacobiflow.native.recurrence import Extrapolation, Recurrence

_TOKENS_PER_PASS = 3200


@dataclass(frozen=True)
class TarFlowCache:
    """Keys and values of a block's tokens while it is solved, and all that does not change meanwhile.

    The network runs in the dtype of these tensors. `layers` are keys and values, written in place, or none for a pass
    over all tokens; `embedding` is the sum of bias, position and context of each token in causal order; `query_scale`
    is one over the attention temperature of each row, or `None` if all are 1.
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


class TransformerBlock(FlowBlock):
    """A block whose log-scale s and shift u come from a causal transformer.

    Its output at position t-1 belongs to entry t, and entry 0 has s = u = 0. Tokens are in the block's own causal order
    throughout: the flow permutes.
    """

    per_sample_front = graph_safe = inference_safe = has_bf16 = has_attention = True

    proj_in: nn.Linear
    proj_out: nn.Linear

    def __init__(self, num_tokens: int, nvp: bool, permutation: Permutation) -> None:
        super().__init__()
        self.num_tokens, self.nvp, self.permutation = num_tokens, nvp, permutation

    @abstractmethod
    def layer_weights(self) -> tuple[LayerWeights, ...]:
        """Returns the parameters of the layers."""

    @abstractmethod
    def positions(self) -> Float[Tensor, "t c"]:
        """Returns what is added to the projection of each token: its bias and the position."""

    @abstractmethod
    def embed_context(self, context: Tensor | None) -> Float[Tensor, "#b #t c"] | None:
        """Returns what the context adds to the projections of a row and a token, both in causal order."""

    def affine_whole(self, x: Float[Tensor, "b t c"], context: Tensor | AttentionContext | None = None) -> ScaleShift:
        return self.affine(x, 0, x.shape[1], self._cache(x, context, self.layer_weights(), layers=()))

    def init_cache(self, z: Float[Tensor, "b t c"], context: Tensor | AttentionContext | None = None) -> TarFlowCache:
        check_input(z, self.num_tokens, self.proj_in.in_features)
        weights, channels = self.layer_weights(), len(self.proj_in.weight)
        heads = weights[0].num_heads
        shape = (z.shape[0], 2, heads, self.num_tokens, channels // heads)
        cache = self._cache(z, context, weights, tuple(self.proj_in.weight.new_zeros(shape) for _ in weights))
        return replace(cache, embedding=cache.embedding.contiguous())

    def _cache(
        self, z: Tensor, context: Tensor | AttentionContext | None, weights: tuple[LayerWeights, ...],
        layers: tuple[Tensor, ...],
    ) -> TarFlowCache:  # fmt: skip
        context, temperature = AttentionContext.of(context)
        return TarFlowCache(
            layers,
            weights,
            self.proj_in.weight,
            (self.proj_out.weight, self.proj_out.bias),
            self._embedding(context).expand(len(z), -1, -1),
            None if temperature is None else self._query_scale(temperature),
        )

    def _embedding(self, context: Tensor | None) -> Float[Tensor, "#b t c"]:
        """Returns the sum of bias, position and context for each token, in causal order."""
        positions, embedding = self.positions().unsqueeze(0), self.embed_context(context)
        return positions if embedding is None else positions + embedding

    @torch.no_grad()
    def exact_inverse(
        self, z: Float[Tensor, "b t c"], context: Tensor | None = None, guidance: Guidance | None = None
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, " b"]] | None:
        layers = self.layer_weights()
        recurrence = Recurrence(
            proj_in=self.proj_in.weight,
            position=self.positions(),
            layers=[layer.named() for layer in layers],
            heads=layers[0].num_heads,
            proj_out=self.proj_out.weight,
            out_bias=self.proj_out.bias,
            has_scale=self.nvp,
        )
        extrapolation = None
        if guidance is not None:
            other = self.embed_context(None)
            extrapolation = Extrapolation(*guidance.weights(z), other, guidance.attn_temperature)
        return recurrence.invert(z, self.embed_context(context), extrapolation)

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
        self, cache: TarFlowCache, rows: Int[Tensor, " m"], context: Tensor | AttentionContext | None = None
    ) -> None:
        context, temperature = AttentionContext.of(context)
        for layer in cache.layers:
            layer.index_fill_(0, rows, 0)
        cache.embedding[rows] = self._embedding(context).to(cache.embedding.dtype)
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
        weights = self.layer_weights()
        hidden, channels = weights[0].up[0].shape
        values = (2 * len(weights) + 1) * channels + 2 * channels + 2 * hidden + self.num_tokens
        return int(self.num_tokens * values * self.proj_in.weight.element_size())

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


class TarFlowBlock(TransformerBlock):
    """One causal affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    Its context is labels (B,) if the config has classes. If it has `context_channels`, K, it is numbers (B, K) for each
    sample, or (B, T, K) for each token in the order of the data, whose projection is added to the tokens' embeddings.
    """

    attn_blocks: Sequence[AttentionBlock]

    def __init__(self, config: TarFlowConfig | TokenConfig, permutation: Permutation, index: int = 0) -> None:
        channels, layers, _ = config.of_block(index)
        super().__init__(config.num_tokens, config.nvp, permutation)
        self.proj_in = nn.Linear(config.token_channels, channels)
        self.pos_embed = nn.Parameter(torch.randn(config.num_tokens, channels) * 1e-2)
        classes, numbers = config.num_classes, config.context_channels
        self.class_embed = nn.Parameter(torch.randn(classes, 1, channels) * 1e-2) if classes else None
        self.proj_context = nn.Linear(numbers, channels) if numbers else None
        self.attn_blocks = nn.ModuleList(  # type: ignore[assignment]
            AttentionBlock(channels, config.head_dim, config.expansion) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, config.token_channels * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)

    def layer_weights(self) -> tuple[LayerWeights, ...]:
        return tuple(layer.weights() for layer in self.attn_blocks)

    def positions(self) -> Float[Tensor, "t c"]:
        return self.permutation(self.pos_embed, dim=0) + self.proj_in.bias

    def embed_context(self, context: Tensor | None) -> Float[Tensor, "#b #t c"] | None:
        if self.proj_context is None:
            return embed_classes(self.class_embed, context)
        check_context(context, self.num_tokens, self.proj_context.in_features)
        projected: Tensor = self.proj_context(context.to(self.pos_embed.dtype))  # type: ignore[union-attr]
        return projected.unsqueeze(1) if projected.ndim == 2 else self.permutation(projected)


def _hidden(tokens: Tensor, positions: slice | Tensor, end: int, cache: TarFlowCache) -> Tensor:
    """The transformer's output for `tokens` at `positions`, which attend to the positions before `end`."""
    span = AttentionSpan.of(positions, end, cache.proj_in)
    embedding = cache.embedding[:, positions] if span.rows is None else cache.embedding[span.rows, positions]
    h = F.linear(tokens.to(embedding.dtype), cache.proj_in) + embedding
    layers = cache.layers or (None,) * len(cache.weights)
    return transformer(h, list(zip(cache.weights, layers, strict=True)), span, cache.query_scale)
