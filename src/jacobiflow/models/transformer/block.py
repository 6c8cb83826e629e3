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

from jacobiflow.blocks.base import FlowBlock, ScaleShift, TokensLogDet, check_input
from jacobiflow.blocks.context import NO_CONTEXT, Context, check_numbers
from jacobiflow.blocks.guidance import Guidance
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.models.config import TarFlowConfig, TokenConfig, embed_classes
from jacobiflow.models.transformer.attention import (
    AttentionBlock,
    AttentionSpan,
    LayerWeights,
    Parameters,
    cast,
    transformer,
)
from jacobiflow.native.transformer import CausalTransformer, GuidanceTerms, Prefix
from jacobiflow.native.weights import copy_bytes

_TOKENS_PER_PASS = 3200


@dataclass(frozen=True)
class TarFlowCache:
    """Keys and values of a block's tokens while it is solved, and all that does not change meanwhile.

    The network runs in the dtype of these tensors.

    Attributes:
        layers: Keys and values, written in place; none for a pass over all tokens.
        embedding: The sum of bias, position and context of each token in causal order.
        query_scale: One over the attention temperature of each row; `None` if all are 1.
        final_norm: Multiplies the normalised output of the last layer; `None` without normalisation.
        prefix: Embeddings of what stands before the tokens, for a pass over all of them.
        first: Log-scale and shift of entry 0, known from the prefix; `None` if they are 0.
    """

    layers: tuple[Float[Tensor, "b 2 h t d"], ...]
    weights: tuple[LayerWeights, ...]
    proj_in: Float[Tensor, "c d"]
    proj_out: Parameters
    embedding: Tokens
    query_scale: Float[Tensor, "b 1 1 1"] | None
    final_norm: Float[Tensor, " c"] | None = None
    prefix: Float[Tensor, "b p c"] | None = None
    first: ScaleShift | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> TarFlowCache:
        """Returns the cache with `change` applied to every tensor that has a row per sample."""
        return replace(
            self,
            layers=tuple(map(change, self.layers)),
            embedding=change(self.embedding),
            query_scale=None if self.query_scale is None else change(self.query_scale),
            prefix=None if self.prefix is None else change(self.prefix),
            first=None if self.first is None else (change(self.first[0]), change(self.first[1])),
        )


class TransformerBlock(FlowBlock):
    """A block whose log-scale s and shift u come from a causal transformer.

    Its output for token t-1 belongs to entry t. Entry 0 has s = u = 0, or those of the last row of a prefix, which
    stands before the tokens. Tokens are in the block's own causal order throughout: the flow permutes.
    """

    per_sample_front = graph_safe = inference_safe = has_bf16 = has_attention = True

    prefix_length = 0
    soft_clip = 0.0
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
    def embed_context(self, values: Tensor | None) -> Float[Tensor, "#b #t c"] | None:
        """Returns the part of a context in the embedding of each row and token, in causal order; `None` for none."""

    def embed_prefix(self, values: Tensor | None, num: int) -> Float[Tensor, "b p c"] | None:
        """Returns the embeddings of the prefix of `num` rows under a context; `None` without a prefix."""
        return None

    def final_norm_weight(self) -> Float[Tensor, " c"] | None:
        """Returns what multiplies the normalised output of the last layer; `None` without normalisation."""
        return None

    def read_out(self, h: Float[Tensor, "b n c"], cache: TarFlowCache, dtype: torch.dtype) -> ScaleShift:
        """Returns the log-scale and the shift that the output of the last layer gives, in `dtype`."""
        out = F.linear(h, *cache.proj_out).to(dtype)
        if not self.nvp:
            return torch.zeros_like(out), out
        log_scale, shift = out.chunk(2, dim=-1)
        return log_scale, shift

    def affine_whole(self, x: Float[Tensor, "b t c"], context: Context = NO_CONTEXT) -> ScaleShift:
        cache = self._cache(x, context, self.layer_weights(), layers=())
        prefix = self.embed_prefix(context.values, len(x))
        return self.affine(x, 0, x.shape[1], replace(cache, prefix=prefix))

    def init_cache(self, z: Float[Tensor, "b t c"], context: Context = NO_CONTEXT) -> TarFlowCache:
        check_input(z, self.num_tokens, self.proj_in.in_features)
        cache = self._empty_cache(z, context, self.prefix_length + self.num_tokens)
        cache = replace(cache, embedding=cache.embedding.contiguous())
        if not self.prefix_length:
            return cache
        hidden = self._read_prefix(cache, context)
        return replace(cache, first=self.read_out(hidden, cache, z.dtype))

    def _prefix(self, z: Tensor, context: Context) -> Prefix:
        """The prefix for the rows of `z`."""
        cache = self._empty_cache(z, context, self.prefix_length)
        return Prefix(cache.layers, self._read_prefix(cache, context)[:, 0])

    def _empty_cache(self, z: Tensor, context: Context, length: int) -> TarFlowCache:
        """A cache without keys and values, of so many positions."""
        weights, channels = self.layer_weights(), len(self.proj_in.weight)
        heads = weights[0].num_heads
        shape = (len(z), 2, heads, length, channels // heads)
        return self._cache(z, context, weights, tuple(self.proj_in.weight.new_zeros(shape) for _ in weights))

    def _cache(
        self, z: Tensor, context: Context, weights: tuple[LayerWeights, ...],
        layers: tuple[Tensor, ...],
    ) -> TarFlowCache:  # fmt: skip
        return TarFlowCache(
            layers,
            weights,
            self.proj_in.weight,
            (self.proj_out.weight, self.proj_out.bias),
            self._embedding(context).expand(len(z), -1, -1),
            self._query_scale(context),
            self.final_norm_weight(),
        )

    def _read_prefix(self, cache: TarFlowCache, context: Context) -> Float[Tensor, "b 1 c"]:
        """Writes keys and values of the prefix to the cache; returns the last layer's output for its last row."""
        prefix = self.embed_prefix(context.values, len(cache.embedding))
        assert prefix is not None
        span = AttentionSpan.of(slice(0, self.prefix_length), self.prefix_length, cache.proj_in)
        layers = list(zip(cache.weights, cache.layers, strict=True))
        return transformer(prefix.to(cache.proj_in.dtype), layers, span, cache.query_scale)[:, -1:]

    def _embedding(self, context: Context) -> Float[Tensor, "#b t c"]:
        """Returns the sum of bias, position and context for each token, in causal order."""
        positions, embedding = self.positions().unsqueeze(0), self.embed_context(context.values)
        return (positions if embedding is None else positions + embedding).to(self.proj_in.weight.dtype)

    @torch.no_grad()
    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, guidance: Guidance | None = None, int16_weights: bool = False
    ) -> TokensLogDet | None:
        layers = self.layer_weights()
        network = CausalTransformer(
            proj_in=self.proj_in.weight,
            position=self.positions(),
            layers=[layer.named() for layer in layers],
            heads=layers[0].num_heads,
            proj_out=self.proj_out.weight,
            out_bias=self.proj_out.bias,
            has_scale=self.nvp,
            rotation=None if layers[0].rotation is None else layers[0].rotation.pairs(),
            final_norm=self.final_norm_weight(),
            soft_clip=self.soft_clip,
        )
        extrapolation = None
        if guidance is not None:
            other, by_density = self.embed_context(None), guidance.rule == "density"
            extrapolation = GuidanceTerms(*guidance.weights(z), other, guidance.attn_temperature, by_density)

        def read_prefix(rows: slice) -> Prefix:
            parts = [self._prefix(z[rows], context[rows])]
            if guidance is not None:
                temperature = z.new_full((len(z[rows]),), guidance.attn_temperature)
                parts.append(self._prefix(z[rows], Context(None, temperature)))
            layers = [torch.cat(pair) for pair in zip(*(part.layers for part in parts), strict=True)]
            return Prefix(layers, torch.cat([part.hidden for part in parts]))

        prefix = read_prefix if self.prefix_length else None
        return network.invert(z, self.embed_context(context.values), extrapolation, prefix, int16_weights)

    def _query_scale(self, context: Context) -> Float[Tensor, "b 1 1 1"] | None:
        if context.temperature is None:
            return None
        return context.temperature.to(self.proj_in.weight).reciprocal().view(-1, 1, 1, 1)

    def affine(self, x: Tokens, start: int, stop: int, cache: TarFlowCache) -> ScaleShift:
        size = max(_TOKENS_PER_PASS // (stop - start), 1)
        if len(x) > size and x.device.type == "cpu" and not torch.is_grad_enabled():
            # The activations of few samples stay in reused memory: a fifth less time at 64; see `keep_freed_memory`.
            parts = [slice(first, first + size) for first in range(0, len(x), size)]
            outputs = [self.affine(x[rows], start, stop, cache.each(itemgetter(rows))) for rows in parts]
            log_scales, shifts = zip(*outputs, strict=True)
            return torch.cat(log_scales), torch.cat(shifts)
        positions = slice(max(start - 1, 0), stop - 1)
        first = self._first(x, cache) if start == 0 and cache.prefix is None else None
        if first is not None and stop == 1:
            return first
        h = self._hidden(x[:, positions], positions, stop - 1, cache)
        log_scale, shift = self.read_out(h, cache, x.dtype)
        if first is None:
            return log_scale, shift
        return torch.cat((first[0], log_scale), dim=1), torch.cat((first[1], shift), dim=1)

    def affine_at(self, x: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: TarFlowCache) -> ScaleShift:
        before = start.view(-1, 1) + torch.arange(-1, size - 1, device=x.device)
        positions = before.clamp(min=0)  # entry 0 has no token before it: it is computed from token 0, and replaced
        tokens = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        log_scale, shift = self.read_out(self._hidden(tokens, positions, end - 1, cache), cache, x.dtype)
        is_first, first = (before < 0).unsqueeze(-1), self._first(x, cache)
        return torch.where(is_first, first[0], log_scale), torch.where(is_first, first[1], shift)

    def move_rows(
        self, cache: TarFlowCache, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int
    ) -> TarFlowCache:
        def moved(tensor: Tensor) -> Tensor:
            tensor[target] = tensor[source]
            return tensor[:num]

        return cache.each(moved)

    def reset_rows(self, cache: TarFlowCache, rows: Int[Tensor, " m"], context: Context = NO_CONTEXT) -> None:
        for layer in cache.layers:
            layer.index_fill_(0, rows, 0)
        cache.embedding[rows] = self._embedding(context).to(cache.embedding.dtype)
        query_scale = self._query_scale(context)
        if cache.query_scale is not None and query_scale is not None:
            cache.query_scale[rows] = query_scale.to(cache.query_scale.dtype)
        if cache.first is not None:
            part = cache.each(itemgetter(rows))
            first = self.read_out(self._read_prefix(part, context), part, cache.first[0].dtype)
            for layer, new in zip(cache.layers, part.layers, strict=True):
                layer[rows] = new
            for values, new in zip(cache.first, first, strict=True):
                values[rows] = new

    def output_weights(self) -> tuple[Float[Tensor, "c d"] | None, Float[Tensor, "c d"]] | None:
        weight = self.proj_out.weight.detach()
        if not self.nvp:
            return None, weight
        scale, shift = weight.chunk(2)
        return scale, shift

    def row_bytes(self) -> int:
        # Keys, values, embedding, residual stream, norm, hidden units twice, and the causal mask.
        weights = self.layer_weights()
        hidden, channels = weights[0].up[0].shape
        length = self.prefix_length + self.num_tokens
        values = (2 * len(weights) + 1) * channels + 2 * channels + 2 * hidden + length
        keys_values = 2 * len(weights) * channels * max(self.proj_in.weight.element_size(), 4)  # of the exact loop
        return int(length * max(values * self.proj_in.weight.element_size(), keys_values))

    def copy_bytes(self) -> int:
        projections = self.proj_in.weight.numel() + self.proj_out.weight.numel()
        in_sums = max(self.proj_in.weight.element_size(), 4)  # bytes of a number
        return copy_bytes([layer.named() for layer in self.layer_weights()]) + projections * in_sums

    def to_bf16(self, cache: TarFlowCache) -> TarFlowCache:
        dtype = torch.bfloat16
        return replace(
            cache.each(lambda tensor: tensor.to(dtype)),
            weights=cast(cache.weights, dtype),
            proj_in=cast(cache.proj_in, dtype),
            proj_out=cast(cache.proj_out, dtype),
            final_norm=cast(cache.final_norm, dtype),
        )

    def _first(self, x: Tensor, cache: TarFlowCache) -> ScaleShift:
        """The log-scale and the shift of entry 0."""
        if cache.first is not None:
            return cache.first[0].to(x.dtype), cache.first[1].to(x.dtype)
        return torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])

    def _hidden(self, tokens: Tensor, positions: slice | Tensor, end: int, cache: TarFlowCache) -> Tensor:
        """The last layer's output for `tokens` at `positions`, which attend to the prefix and positions before `end`.

        A pass over all tokens also has the output for the last row of the prefix.
        """
        length = self.prefix_length
        if cache.prefix is not None:
            places: slice | Tensor = slice(0, length + end)
        elif isinstance(positions, slice):
            places = slice(length + positions.start, length + positions.stop)
        else:
            places = positions + length
        span = AttentionSpan.of(places, length + end, cache.proj_in)
        embedding = cache.embedding[:, positions] if span.rows is None else cache.embedding[span.rows, positions]
        h = F.linear(tokens.to(embedding.dtype), cache.proj_in) + embedding
        layers = cache.layers or (None,) * len(cache.weights)
        if cache.prefix is not None:
            h = torch.cat((cache.prefix, h), dim=1)
        h = transformer(h, list(zip(cache.weights, layers, strict=True)), span, cache.query_scale)
        return h if cache.prefix is None else h[:, length - 1 :]


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
        return self.permutation(_widened(self.pos_embed), dim=0) + self.proj_in.bias

    def embed_context(self, values: Tensor | None) -> Float[Tensor, "#b #t c"] | None:
        if self.proj_context is None:
            return embed_classes(None if self.class_embed is None else _widened(self.class_embed), values)
        check_numbers(values, self.num_tokens, self.proj_context.in_features)
        weight, bias = map(_widened, self.proj_context.parameters())
        projected = F.linear(values.to(weight.dtype), weight, bias)  # type: ignore[union-attr]
        return projected.unsqueeze(1) if projected.ndim == 2 else self.permutation(projected)


def _widened(tensor: Tensor) -> Tensor:
    """A small parameter of a network of 16 bits in float32, in which the exact loop computes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
