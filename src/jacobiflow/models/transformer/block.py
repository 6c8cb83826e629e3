"""Blocks whose log-scales and shifts come from a causal transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from jacobiflow.blocks.base import AttentionBlock, FlowBlock, ScaleShift, TokensLogDet, check_context_rows, check_input
from jacobiflow.blocks.context import NO_CONTEXT, Context, GuidedRows
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens, row_batches
from jacobiflow.errors import UnsupportedError
from jacobiflow.models.transformer.attention import (
    AttentionSpan,
    Layer,
    LayerWeights,
    SharedParameters,
    run_layer,
    run_layers,
)
from jacobiflow.models.transformer.cache import Projections, TransformerCache
from jacobiflow.native.transformer import CausalTransformer, GuidanceWeights, RowInputs
from jacobiflow.native.weights import copy_bytes

_TOKENS_PER_PASS = 3200
"""Tokens in one pass on a CPU. The activations of more samples would not stay in reused memory: a fifth more time at 64
samples; see `keep_freed_memory`."""


class TransformerBlock(FlowBlock, AttentionBlock):
    """A block whose log-scale s and shift u come from a causal transformer.

    Its output for token t-1 belongs to entry t. Entry 0 has s = u = 0, or those of the last row of a prefix, which
    stands before the tokens. Tokens are in the block's own causal order throughout: the flow permutes.
    """

    is_pure = True
    prefix_length = 0
    soft_clip = 0.0
    recomputes_layers = False
    proj_in: nn.Linear
    proj_out: nn.Linear
    attn_blocks: Sequence[Layer]

    def __init__(self, num_tokens: int, nvp: bool, permutation: Permutation) -> None:
        super().__init__()
        self.num_tokens, self.nvp, self.permutation = num_tokens, nvp, permutation

    def shared_parameters(self) -> SharedParameters:
        """Returns the parameters that the layers share."""
        return SharedParameters()

    def layer_weights(self) -> tuple[LayerWeights, ...]:
        """Returns the parameters of the layers."""
        shared = self.shared_parameters()
        return tuple(layer.weights(shared) for layer in self.attn_blocks)

    @abstractmethod
    def positions(self) -> Float[Tensor, "t w"]:
        """Returns what is added to the projection of each token: its bias and the position."""

    @abstractmethod
    def embed_context(self, values: Tensor | None) -> Float[Tensor, "#b #t w"] | None:
        """Returns the part of a context in the embedding of each row and token, in causal order; `None` for none."""

    def embed_prefix(self, values: Tensor | None, num: int) -> Float[Tensor, "b p w"]:
        """Returns the embeddings of the prefix of `num` rows under a context, if there is a prefix."""
        raise NotImplementedError

    def final_norm_weight(self) -> Float[Tensor, " w"] | None:
        """Returns what multiplies the normalised output of the last layer; `None` without normalisation."""
        return None

    def read_out(self, h: Float[Tensor, "b n w"], projections: Projections, dtype: torch.dtype) -> ScaleShift:
        """Returns the log-scale and the shift that the output of the last layer gives, in `dtype`."""
        out = F.linear(h, *projections.proj_out).to(dtype)
        if not self.nvp:
            return torch.zeros_like(out), out
        log_scale, shift = out.chunk(2, dim=-1)
        return log_scale, shift

    def affine_whole(self, x: Tokens, context: Context = NO_CONTEXT) -> ScaleShift:
        batches = _row_batches(x, x.shape[1])
        if len(batches) > 1:
            return _concatenate((self.affine_whole(x[rows], context[rows]) for rows in batches), dim=0)
        projections, shared = self._projections(), self.shared_parameters()
        embedding, query_scale = self._embed(context), self._query_scale(context)
        h = F.linear(x[:, :-1].to(embedding.dtype), projections.proj_in) + embedding[:, :-1]
        if self.prefix_length:
            h = torch.cat((self.embed_prefix(context.values, len(x)), h), dim=1)
        span = AttentionSpan.of(slice(0, h.shape[1]), h.shape[1], projections.proj_in)

        def run(layer: Layer, h: Tokens, hide_nonfinite: bool) -> Tokens:
            is_recomputed = self.recomputes_layers and torch.is_grad_enabled()
            call: Any = partial(checkpoint, layer, use_reentrant=False) if is_recomputed else layer
            out: Tokens = call(
                lambda x: run_layer(x, layer.weights(shared), None, span, query_scale, hide_nonfinite), h
            )
            return out

        if h.shape[1]:
            h = run_layers(h, [partial(run, layer) for layer in self.attn_blocks])
        if self.prefix_length:
            return self.read_out(h[:, self.prefix_length - 1 :], projections, x.dtype)
        log_scale, shift = self.read_out(h, projections, x.dtype)
        return F.pad(log_scale, (0, 0, 1, 0)), F.pad(shift, (0, 0, 1, 0))

    def init_cache(self, z: Float[Tensor, "b t c"], context: Context = NO_CONTEXT) -> TransformerCache:
        check_input(z, self.num_tokens, self.proj_in.in_features)
        cache = self._make_cache(z, context, self.prefix_length + self.num_tokens)
        entry0 = cache.entry0_params
        if self.prefix_length:
            entry0 = self.read_out(self._read_prefix(cache, context), cache.projections, z.dtype)
        return replace(cache, embedding=cache.embedding.contiguous(), entry0_params=entry0)

    def _make_cache(self, z: Tensor, context: Context, length: int) -> TransformerCache:
        """Returns a cache of `length` positions for the rows of `z`, its keys and values 0."""
        weights = self.layer_weights()
        heads = weights[0].num_heads
        shape = (len(z), 2, heads, length, len(self.proj_in.weight) // heads)
        return TransformerCache(
            tuple(self.proj_in.weight.new_zeros(shape) for _ in weights),
            weights,
            self._projections(),
            self._embed(context).expand(len(z), -1, -1),
            self._query_scale(context),
            (torch.zeros_like(z[:, :1]), torch.zeros_like(z[:, :1])),
        )

    def _projections(self) -> Projections:
        return Projections(self.proj_in.weight, (self.proj_out.weight, self.proj_out.bias), self.final_norm_weight())

    def _embed(self, context: Context) -> Float[Tensor, "#b t w"]:
        """Returns the sum of bias, position and context for each token, in causal order."""
        positions, embedding = self.positions().unsqueeze(0), self.embed_context(context.values)
        return (positions if embedding is None else positions + embedding).to(self.proj_in.weight.dtype)

    def _query_scale(self, context: Context) -> Float[Tensor, "b 1 1 1"] | None:
        if context.temperature is None:
            return None
        return context.temperature.to(self.proj_in.weight).reciprocal().view(-1, 1, 1, 1)

    def _read_prefix(self, cache: TransformerCache, context: Context) -> Float[Tensor, "b 1 w"]:
        """Writes keys and values of the prefix to the cache; returns the last layer's output for its last row."""
        prefix = self.embed_prefix(context.values, len(cache.embedding)).to(cache.embedding.dtype)
        span = AttentionSpan.of(slice(0, self.prefix_length), self.prefix_length, cache.embedding)
        return _run_cached(prefix, span, cache)[:, -1:]

    def _row_inputs(self, z: Tokens, context: Context) -> RowInputs:
        """Returns the inputs of rows of the network under a context, as native code takes them."""
        scale = None if context.temperature is None else context.temperature.reciprocal()
        inputs = RowInputs(self.embed_context(context.values), scale)
        if not self.prefix_length:
            return inputs
        cache = self._make_cache(z, context, self.prefix_length)
        return inputs._replace(prefix=cache.layers, hidden=self._read_prefix(cache, context)[:, 0])

    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, batch_size: int | None = None
    ) -> TokensLogDet:
        network, row_inputs = self._describe(z, [context])
        return network.invert(z, row_inputs, None, batch_size)

    def guided_inverse(self, z: Tokens, rows: GuidedRows, batch_size: int | None = None) -> TokensLogDet:
        network, row_inputs = self._describe(z, [rows.conditional, rows.unconditional])
        return network.invert(z, row_inputs, GuidanceWeights(*rows.weights, rows.rule), batch_size)

    @torch.no_grad()
    def _describe(
        self, z: Tokens, contexts: Sequence[Context]
    ) -> tuple[CausalTransformer, Callable[[slice], RowInputs]]:
        """Returns the network for native code, and a function of the inputs of its rows: one for each context."""
        if z.requires_grad:
            raise UnsupportedError("gradients of a transformer's inverse")
        for context in contexts:
            check_context_rows(context, len(z))
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

        def row_inputs(rows: slice) -> RowInputs:
            return RowInputs.stack([self._row_inputs(z[rows], each[rows]) for each in contexts], len(z[rows]))

        return network, row_inputs

    def affine(self, x: Tokens, start: int, stop: int, cache: TransformerCache) -> ScaleShift:
        batches = _row_batches(x, stop - start)
        if len(batches) > 1:
            parts = (self.affine(x[rows], start, stop, cache.map_rows(itemgetter(rows))) for rows in batches)
            return _concatenate(parts, dim=0)
        if stop == 1:
            return cache.entry0(x.dtype)
        positions = slice(max(start - 1, 0), stop - 1)
        h = self._run_network(x[:, positions], positions, stop - 1, cache)
        params = self.read_out(h, cache.projections, x.dtype)
        return params if start else _concatenate((cache.entry0(x.dtype), params), dim=1)

    def affine_at(
        self, x: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: TransformerCache
    ) -> ScaleShift:
        before = start.view(-1, 1) + torch.arange(-1, size - 1, device=x.device)
        positions = before.clamp(min=0)  # Entry 0 is computed from token 0, and replaced below.
        tokens = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        log_scale, shift = self.read_out(
            self._run_network(tokens, positions, end - 1, cache), cache.projections, x.dtype
        )
        is_first, first = (before < 0).unsqueeze(-1), cache.entry0(x.dtype)
        return torch.where(is_first, first[0], log_scale), torch.where(is_first, first[1], shift)

    def _run_network(self, tokens: Tensor, positions: slice | Tensor, end: int, cache: TransformerCache) -> Tensor:
        """Returns the last layer's output for tokens at `positions`; they attend to the prefix and all before `end`."""
        span = AttentionSpan.of(positions, end, cache.embedding, self.prefix_length)
        embedding = cache.embedding[:, positions] if span.rows is None else cache.embedding[span.rows, positions]
        h = F.linear(tokens.to(embedding.dtype), cache.projections.proj_in) + embedding
        return _run_cached(h, span, cache)

    def move_rows(
        self, cache: TransformerCache, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int
    ) -> TransformerCache:
        def move(tensor: Tensor) -> Tensor:
            tensor[target] = tensor[source]
            return tensor[:num]

        return cache.map_rows(move)

    def reset_rows(self, cache: TransformerCache, rows: Int[Tensor, " m"], context: Context = NO_CONTEXT) -> None:
        for layer in cache.layers:
            layer.index_fill_(0, rows, 0)
        cache.embedding[rows] = self._embed(context).to(cache.embedding.dtype)
        query_scale = self._query_scale(context)
        if cache.query_scale is not None and query_scale is not None:
            cache.query_scale[rows] = query_scale.to(cache.query_scale.dtype)
        if self.prefix_length:
            part = cache.map_rows(itemgetter(rows))
            hidden, dtype = self._read_prefix(part, context), cache.entry0_params[0].dtype
            params = self.read_out(hidden, part.projections, dtype)
            for tensor, new in zip((*cache.layers, *cache.entry0_params), (*part.layers, *params), strict=True):
                tensor[rows] = new

    def to_bf16(self, cache: TransformerCache) -> TransformerCache:
        return cache.to(torch.bfloat16)

    def output_weights(self) -> tuple[Float[Tensor, "c w"] | None, Float[Tensor, "c w"]] | None:
        weight = self.proj_out.weight.detach()
        if not self.nvp:
            return None, weight
        scale, shift = weight.chunk(2)
        return scale, shift

    def row_bytes(self) -> int:
        # These are keys, values, embedding, residual stream, norm, hidden units twice, and the causal mask.
        weights, element_size = self.layer_weights(), self.proj_in.weight.element_size()
        hidden, width = weights[0].up[0].shape
        length = self.prefix_length + self.num_tokens
        values = 3 * width + 2 * hidden + length
        native_keys_values = 2 * len(weights) * width * length * max(element_size, 4)
        return int(max(self.cache_bytes() + length * values * element_size, native_keys_values))

    def cache_bytes(self) -> int:
        weight = self.proj_in.weight
        return 2 * len(self.layer_weights()) * weight.nbytes // weight.shape[1] * (self.prefix_length + self.num_tokens)

    def copy_bytes(self) -> int:
        projections = self.proj_in.weight.numel() + self.proj_out.weight.numel()
        bytes_per_number = max(self.proj_in.weight.element_size(), 4)
        return copy_bytes([layer.named() for layer in self.layer_weights()]) + projections * bytes_per_number


def _run_cached(h: Tokens, span: AttentionSpan, cache: TransformerCache) -> Tokens:
    """Returns the last layer's output for the tokens of a span, and writes their keys and values to the cache."""

    def run(layer: tuple[LayerWeights, Tensor], h: Tokens, hide_nonfinite: bool) -> Tokens:
        return run_layer(h, *layer, span, cache.query_scale, hide_nonfinite)

    return run_layers(h, [partial(run, layer) for layer in zip(cache.weights, cache.layers, strict=True)])


def _row_batches(x: Tokens, num_tokens: int) -> list[slice]:
    """Returns the rows of each pass over `num_tokens` tokens of a sample: all, or a few without gradients on a CPU."""
    is_split = x.device.type == "cpu" and not torch.is_grad_enabled()
    return row_batches(len(x), max(_TOKENS_PER_PASS // num_tokens, 1) if is_split else None)


def _concatenate(parts: Iterable[ScaleShift], dim: int) -> ScaleShift:
    log_scale, shift = (torch.cat(tensors, dim) for tensors in zip(*parts, strict=True))
    return log_scale, shift
