"""One block of a TarFlow: a causal transformer that gives the log-scale and shift of every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.flows.base import (
    AffineFrontPerSample,
    ExactInverse,
    Extrapolation,
    FlowBlock,
    KeepsNothing,
    LowPrecision,
    Replayable,
    check_input,
)
from jacobiflow.flows.labels import embed_classes
from jacobiflow.flows.permutation import Permutation
from jacobiflow.flows.tarflow import recurrence
from jacobiflow.flows.tarflow.attention import AttentionBlock, Fed, Parameters, transformer
from jacobiflow.flows.tarflow.cache import TarFlowCache
from jacobiflow.flows.tarflow.config import TarFlowConfig

_TOKENS_AT_A_TIME = 3200


class TarFlowBlock(FlowBlock, AffineFrontPerSample, LowPrecision, ExactInverse, Replayable, KeepsNothing):
    """One causal affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    `s` (log-scale) and `u` (shift) come from a causal transformer; its output at position t-1 belongs to entry t, and
    entry 0 has s = u = 0. Tokens are in the block's own causal order throughout: the flow permutes.
    """

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

    def embed_classes(self, labels: Int[Tensor, " b"] | None) -> Float[Tensor, "#b 1 c"] | None:
        """Class embedding per row; the mean over classes for a row without a label (`None`, or below 0)."""
        return embed_classes(self.class_embed, labels)

    def affine_whole(
        self,
        x: Float[Tensor, "b t c"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"]]:
        """With no keys kept; see `AffineBlock.affine_whole`."""
        if not torch.is_grad_enabled() and (parts := _parts(x, x.shape[1])):
            given = ([None if t is None else t[rows] for t in (x, context, attn_temperature)] for rows in parts)
            return _joined(self.affine_whole(*part) for part in given)  # type: ignore[arg-type]
        if x.shape[1] == 1:  # entry 0 has no token before it
            return torch.zeros_like(x), torch.zeros_like(x)
        weight = self.proj_in.weight
        h = F.linear(x[:, :-1].to(weight.dtype), weight) + self._embedding(context)[..., :-1, :]
        layers = [(layer.weights(), None) for layer in self.attn_blocks]
        h = transformer(h, layers, query_scale=self._query_scale(attn_temperature))
        return self._read_out(h, x, (self.proj_out.weight, self.proj_out.bias), first=True)

    def init_cache(
        self,
        z: Float[Tensor, "b t c"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> TarFlowCache:
        """An empty cache for the rows of `z` under labels `context`; see `AffineBlock.init_cache`."""
        check_input(z, context, self.num_tokens, self.proj_in.in_features)
        attention = self.attn_blocks[0].attention
        weight = attention.qkv.weight
        heads, channels = attention.num_heads, weight.shape[1]
        shape = (z.shape[0], 2, heads, self.num_tokens, channels // heads)
        return TarFlowCache(
            tuple(weight.new_zeros(shape) for _ in self.attn_blocks),
            tuple(layer.weights() for layer in self.attn_blocks),
            self.proj_in.weight,
            (self.proj_out.weight, self.proj_out.bias),
            self._embedding(context),
            torch.arange(z.shape[0], device=weight.device).view(-1, 1),
            self._query_scale(attn_temperature),
        )

    def _embedding(self, context: Tensor | None) -> Tensor:
        """What is added to the projections of tokens, in causal order; (T, C) where all samples share it."""
        positions = self.permutation(self.pos_embed, dim=0) + self.proj_in.bias
        classes = self.embed_classes(context)
        if classes is None:
            return positions
        return positions + (classes if context is not None else classes[0])

    def _query_scale(self, attn_temperature: Tensor | None) -> Tensor | None:
        if attn_temperature is None:
            return None
        return attn_temperature.to(self.proj_in.weight).reciprocal().view(-1, 1, 1, 1)

    def affine(
        self, x: Float[Tensor, "b t c"], start: int, stop: int, cache: TarFlowCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """Log-scale and shift of entries [start, stop); feeds positions start-1 .. stop-2 and stores their keys."""
        if parts := _parts(x, stop - start):
            return _joined(self.affine(x[rows], start, stop, cache.each(itemgetter(rows))) for rows in parts)
        if stop == 1:  # entry 0 has no token before it
            return torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
        positions = slice(max(start - 1, 0), stop - 1)
        h = _hidden(x[:, positions], positions, stop - 1, cache)
        return self._read_out(h, x, cache.proj_out, first=start == 0)

    def affine_at(
        self, x: Float[Tensor, "b t c"], start: Int[Tensor, " b"], size: int, end: int, cache: TarFlowCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """`affine` with a start per sample; see `jacobiflow.flows.base.FrontPerSample`."""
        before = start.view(-1, 1) + torch.arange(-1, size - 1, device=x.device)
        positions = before.clamp(min=0)  # entry 0 has no token before it: it is computed from token 0, and set to zero
        tokens = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        log_scale, shift = self._read_out(_hidden(tokens, positions, end - 1, cache), x, cache.proj_out, first=False)
        first = (before < 0).unsqueeze(-1)
        return log_scale.masked_fill(first, 0), shift.masked_fill(first, 0)

    def move(self, cache: TarFlowCache, source: Int[Tensor, " m"], target: Int[Tensor, " m"], num: int) -> TarFlowCache:
        """See `FrontPerSample.move`."""
        return cache.move(source, target, num)

    def refill(
        self,
        cache: TarFlowCache,
        rows: Int[Tensor, " m"],
        context: Int[Tensor, " m"] | None = None,
        attn_temperature: Float[Tensor, " m"] | None = None,
    ) -> None:
        """See `AffineFrontPerSample.refill`."""
        cache.refill(rows, self._embedding(context), self._query_scale(attn_temperature))

    def output_weights(self) -> tuple[Float[Tensor, "c d"] | None, Float[Tensor, "c d"]]:
        """The halves of `proj_out`'s weight; see `AffineBlock.output_weights`."""
        weight = self.proj_out.weight.detach()
        if not self.nvp:
            return None, weight
        scale, shift = weight.chunk(2)
        return scale, shift

    def row_bytes(self) -> int:
        """Keys, values and embedding; the residual stream, its norm, twice the hidden units, and a causal mask."""
        hidden, channels = self.attn_blocks[0].weights().up[0].shape
        values = (2 * len(self.attn_blocks) + 1) * channels + 2 * channels + 2 * hidden + self.num_tokens
        return int(self.num_tokens * values * self.pos_embed.element_size())

    def lower(self, cache: TarFlowCache) -> TarFlowCache:
        """The cache with which the network runs in bfloat16."""
        return cache.to(torch.bfloat16)

    def exact_inverse(
        self,
        z: Float[Tensor, "b t c"],
        context: Int[Tensor, " b"] | None = None,
        extrapolation: Extrapolation | None = None,
    ) -> Float[Tensor, "b t c"] | None:
        """By native code; see `jacobiflow.flows.base.ExactInverse`."""
        return recurrence.exact_inverse(self, z, context, extrapolation)

    def _read_out(self, h: Tensor, x: Tensor, proj_out: Parameters, first: bool) -> tuple[Tensor, Tensor]:
        out = F.linear(h, *proj_out).to(x.dtype)
        if first:
            out = F.pad(out, (0, 0, 1, 0))
        if self.nvp:
            log_scale, shift = out.chunk(2, dim=-1)
            return log_scale, shift
        return torch.zeros_like(out), out


def _parts(x: Tensor, size: int) -> list[slice]:
    """The samples that go through the network together, `size` tokens of each; none where all do.

    On a CPU they are no more than have their activations in reused memory, which is a fifth of the time at 64 samples;
    see `keep_freed_memory`.
    """
    rows = max(_TOKENS_AT_A_TIME // size, 1)
    if x.device.type != "cpu" or len(x) <= rows:
        return []
    return [slice(first, first + rows) for first in range(0, len(x), rows)]


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    log_scales, shifts = zip(*parts, strict=True)
    return torch.cat(log_scales), torch.cat(shifts)


def _hidden(tokens: Tensor, positions: slice | Tensor, end: int, cache: TarFlowCache) -> Tensor:
    """What the transformer makes of `tokens` at `positions`, which attend to the positions before `end`."""
    embedding = cache.embedding
    if isinstance(positions, slice):
        embedding = embedding[..., positions, :]
    else:
        embedding = embedding[positions] if embedding.ndim == 2 else embedding[cache.rows, positions]
    h = F.linear(tokens.to(embedding.dtype), cache.proj_in) + embedding
    fed = Fed.of(positions, end, cache.rows, cache.proj_in)
    return transformer(h, list(zip(cache.weights, cache.layers, strict=True)), fed, cache.query_scale)
