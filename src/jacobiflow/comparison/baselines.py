"""The samplers of the original codes, which speed-ups are measured against.

- "growing cache" is the sampler of the original TarFlow code (Zhai et al., arXiv 2412.06329). For each token, every
  layer concatenates its whole list of keys and values again. Guidance makes a second call for each token.
- "token loop" is the sampler of STARFlow (Gu et al., arXiv 2506.06276; code: apple/ml-starflow). Its cache is allocated
  once. For each token, all keys are rotated to their positions again.
- "full passes" is the sampler of MAF codes (Papamakarios et al., arXiv 1705.07057; the "For" loop of section 4.4 of the
  GS-Jacobi paper). Each token takes a pass of the masked network over all entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.blocks.guidance import Guidance, SamplingSettings
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.maf import MAF, MAFBlock, run_masked_layers
from jacobiflow.models.starflow import STARFlow, STARFlowBlock
from jacobiflow.models.tarflow import TarFlow, TarFlowBlock
from jacobiflow.models.transformer.attention import Attention, AttentionBlock, Rotation
from jacobiflow.sampling.result import Samples
from jacobiflow.sampling.sample import sample

GROWING_CACHE, TOKEN_LOOP, FULL_PASSES, SEQUENTIAL = "growing cache", "token loop", "full passes", "sequential"

OriginalSampler = Callable[[Flow, Tensor, Tensor | None], Tensor]
"""Maps a flow, standard normal latents (N, T, C), and a context or `None` to data, which is not clipped."""


@torch.no_grad()
def _sample(invert_block: Callable[..., Tensor], flow: Flow, z: Tensor, context: Tensor | None) -> Tensor:
    def solve(i: int, x: Tensor) -> Tensor:
        return invert_block(flow.block(i), x, context, flow.guidance)

    return flow.from_tokens(flow.map_blocks_reversed(flow.prior_tokens(z), solve))


def _solve_by_growing_cache(
    block: TarFlowBlock, x: Tensor, context: Tensor | None, guidance: Guidance | None
) -> Tensor:
    """Solves one block at `x` (N, T, C), in the block's causal order; overwrites `x`."""
    conditional = CachedNetwork(block, context, 1.0)
    unconditional = None if guidance is None else CachedNetwork(block, None, guidance.attn_temperature)
    weights = None if guidance is None else guidance.weights(x)
    for t in range(1, x.shape[1]):
        log_scale, shift = conditional.step(x, t - 1)
        if unconditional is not None:
            log_scale, shift = _guided(guidance, weights, t, (log_scale, shift), unconditional.step(x, t - 1))
        x[:, t] = x[:, t] * log_scale.exp() + shift
    return x


def _solve_by_token_loop(block: STARFlowBlock, z: Tensor, context: Tensor | None, guidance: Guidance | None) -> Tensor:
    """Solves one block at `z`, in the block's causal order; under guidance a sample has two rows of the batch."""
    guidance, num = guidance if block.is_guided else None, len(z)
    rotation = block.layer_weights()[0].rotation
    assert rotation is not None
    text, temperature = block.embed_prefix(context, num)[:, :-1], None
    if guidance is not None:
        text, z = torch.cat((text, block.embed_prefix(None, num)[:, :-1])), torch.cat((z, z))
        if guidance.attn_temperature != 1:
            temperature = z.new_tensor((1.0, guidance.attn_temperature)).repeat_interleave(num).view(-1, 1, 1, 1)
    heads = block.attn_blocks[0].attention.num_heads
    shape = (2, len(z), heads, len(rotation.cos), block.proj_in.out_features // heads)
    layers = [_RotaryLayer(layer, rotation, temperature, z.new_zeros(shape)) for layer in block.attn_blocks]
    if text.shape[1]:
        for layer in layers:
            text = layer.step(text)
    x = z.clone()
    weights = None if guidance is None else guidance.weights(z)
    for t in range(z.shape[1]):
        token = block.sos_embed.expand(len(z), -1, -1) if t == 0 else x[:, t - 1 : t].to(block.sos_embed.dtype)
        log_scale, shift = _rotary_step(block, layers, token, z.dtype)
        if guidance is not None:
            rows = zip(log_scale.chunk(2), shift.chunk(2), strict=True)
            log_scale, shift = (each.repeat(2, 1) for each in _guided(guidance, weights, t, *rows))
        x[:, t] = z[:, t] * log_scale.exp() + shift
    return x[:num]


def _rotary_step(
    block: STARFlowBlock, layers: Sequence[_RotaryLayer], token: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Passes one token through the network, and returns log-scale and shift of the next token."""
    h = block.proj_in(token)
    for layer in layers:
        h = layer.step(h)
    h = F.rms_norm(h, (h.shape[-1],), block.final_norm_weight(), 1e-6)
    out = block.proj_out(h)[:, 0].to(dtype)
    scale, shift = (block.soft_clip * torch.tanh(out / block.soft_clip)).chunk(2, dim=-1)
    return F.softplus(scale + math.log(math.e - 1)).log(), shift


@dataclass
class _RotaryLayer:
    """A transformer layer with rotary positions; its cache (2, N, heads, positions, head_dim) has unrotated keys."""

    module: AttentionBlock
    rotation: Rotation
    temperature: Tensor | None
    cache: Tensor
    length: int = 0

    def step(self, h: Tensor) -> Tensor:
        """Passes tokens (N, n, channels) through the layer; they attend to the tokens before."""
        attention, mlp, first = self.module.attention, self.module.mlp, self.length
        self.length = last = first + h.shape[1]
        packed = attention.qkv(attention.norm(h)).unflatten(-1, (3, attention.num_heads, -1))
        self.cache[:, :, :, first:last] = packed[:, :, 1:].permute(2, 0, 3, 1, 4)
        query = self._rotate(packed[:, :, 0].transpose(1, 2), slice(first, last))
        if self.temperature is not None:
            query = query / self.temperature.to(query.dtype)
        keys = self._rotate(self.cache[0, :, :, :last].to(h.dtype), slice(0, last))
        values = self.cache[1, :, :, :last].to(h.dtype)
        out = F.scaled_dot_product_attention(query, keys, values, is_causal=first == 0 and last > 1)
        h = h + attention.proj(out.transpose(1, 2).flatten(2))
        return cast(Tensor, h + mlp.main(mlp.norm(h)))

    def _rotate(self, x: Tensor, positions: slice) -> Tensor:
        cos, sin = (table[positions].repeat_interleave(2, dim=-1) for table in self.rotation)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def _solve_by_full_passes(block: MAFBlock, z: Tensor, labels: Tensor | None, guidance: Guidance | None) -> Tensor:
    """Solves one block at `z`, in the block's causal order."""
    x = torch.zeros_like(z)
    layers = block.masked_layers(labels)
    free_layers = None if guidance is None else block.masked_layers()
    weights = None if guidance is None else guidance.weights(z)
    for t in range(z.shape[1]):
        log_scale, shift = (out[:, t] for out in run_masked_layers(x, layers))
        if free_layers is not None:
            free = [out[:, t] for out in run_masked_layers(x, free_layers)]
            log_scale, shift = _guided(guidance, weights, t, (log_scale, shift), free)
        x[:, t] = z[:, t] * log_scale.exp() + shift
    return x


def _guided(
    guidance: Any, weights: Any, t: int, params: Sequence[Tensor], free: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns log-scale and shift of entry `t`, moved away from the unconditional ones."""
    (log_scale, shift), (free_log_scale, free_shift), (w, w_shift) = params, free, (each[t] for each in weights)
    if guidance.rule == "linear":
        return log_scale + w * (log_scale - free_log_scale), shift + w_shift * (shift - free_shift)
    ratio = (log_scale - free_log_scale).exp().clamp(max=1).square()
    precision = 1 + w - w * ratio
    return log_scale - precision.log() / 2, ((1 + w) * shift - w * ratio * free_shift) / precision


@dataclass
class _CachedLayer:
    """A transformer layer with the keys and values (N, heads, 1, head_dim) of the tokens before."""

    module: AttentionBlock
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def step(self, h: Tensor, temperature: float) -> Tensor:
        """Passes one token (N, 1, channels) through the layer; it attends to all tokens before."""
        h = h + self._attend(self.module.attention, h, temperature)
        mlp = self.module.mlp
        return cast(Tensor, h + mlp.main(mlp.norm(h)))

    def _attend(self, attention: Attention, h: Tensor, temperature: float) -> Tensor:
        packed = attention.qkv(attention.norm(h))
        # From (N, 1, 3 * heads * head_dim) to (N, 3 * heads, 1, head_dim): the heads of q, then of k, then of v.
        query, key, value = packed.view(len(h), 1, 3 * attention.num_heads, -1).transpose(1, 2).chunk(3, dim=1)
        self.keys.append(key)
        self.values.append(value)
        scale = query.shape[-1] ** -0.5 / temperature
        out = F.scaled_dot_product_attention(query, torch.cat(self.keys, 2), torch.cat(self.values, 2), scale=scale)
        return cast(Tensor, attention.proj(out.transpose(1, 2).reshape(h.shape)))


class CachedNetwork:
    """A TarFlow block's network that is evaluated token by token under one context."""

    def __init__(self, block: TarFlowBlock, context: Tensor | None, temperature: float) -> None:
        self.block = block
        self.position_embedding = block.permutation(block.pos_embed, dim=0)
        embedded = block.embed_context(context)
        self.context = None if embedded is None else embedded.to(self.position_embedding.dtype)
        self.temperature = temperature
        self.layers = [_CachedLayer(layer) for layer in block.attn_blocks]

    def step(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Returns log-scale and shift (N, C) of the entry after `position`, in the dtype of `x` (N, T, C)."""
        token = x[:, position : position + 1].to(self.position_embedding.dtype)
        h = self.block.proj_in(token) + self.position_embedding[position : position + 1]
        if self.context is not None:
            h = h + (self.context if self.context.shape[1] == 1 else self.context[:, position : position + 1])
        for layer in self.layers:
            h = layer.step(h, self.temperature)
        out = self.block.proj_out(h)[:, 0].to(x.dtype)
        if not self.block.nvp:
            return torch.zeros_like(out), out
        log_scale, shift = out.chunk(2, dim=-1)
        return log_scale, shift


def original_sampler(flow: Flow) -> tuple[str, OriginalSampler]:
    """Returns the name and the sampler of a flow's original code.

    The names are "growing cache" for a TarFlow, "token loop" for a STARFlow and "full passes" for a MAF. Any other flow
    has this library's own loop, "sequential".
    """
    check_flow(flow)
    if isinstance(flow, TarFlow):
        return GROWING_CACHE, partial(_sample, _solve_by_growing_cache)
    if isinstance(flow, STARFlow):
        return TOKEN_LOOP, partial(_sample, _solve_by_token_loop)
    if isinstance(flow, MAF):
        return FULL_PASSES, partial(_sample, _solve_by_full_passes)
    return SEQUENTIAL, lambda flow, z, context: sequential_samples(flow, z, context).x


def sequential_samples(flow: Flow, z: Tensor, context: Tensor | None, denoise: float = 0.0) -> Samples:
    """Draws samples by this library's own loop, without certificates or densities."""
    settings = SamplingSettings(denoise=denoise)
    return sample(
        flow, latents=z, context=context, settings=settings, strategy=SEQUENTIAL, certify=False, log_prob=False
    )
