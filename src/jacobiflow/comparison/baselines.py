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

from jacobiflow.blocks.base import ScaleShift
from jacobiflow.blocks.guidance import Guidance, SamplingSettings
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.maf import MAF, MAFBlock, run_masked_layers
from jacobiflow.models.starflow import STARFlow, STARFlowBlock
from jacobiflow.models.tarflow import TarFlow, TarFlowBlock
from jacobiflow.models.transformer.attention import Attention, Rotation, TransformerLayer
from jacobiflow.sampling.result import Samples
from jacobiflow.sampling.sample import sample

GROWING_CACHE, TOKEN_LOOP, FULL_PASSES, SEQUENTIAL = "growing cache", "token loop", "full passes", "sequential"

OriginalSampler = Callable[[Flow, Tensor, Tensor | None], Tensor]
"""Maps a flow, standard normal latents (N, T, C), and a context or `None` to data, which is not clipped."""
_Network = Callable[[Tensor, int], Sequence[ScaleShift]]
"""Maps x (N, T, C) and t to log-scale and shift (N, C) of entry t; under guidance to the unconditional ones, too."""


@torch.no_grad()
def _sample(make_network: Callable[..., _Network], flow: Flow, z: Tensor, context: Tensor | None) -> Tensor:
    def solve(i: int, z: Tensor) -> Tensor:
        """Solves a block at `z`, in its causal order, token by token."""
        block, x = flow.block(i), z.clone()
        guidance = flow.guidance if block.supports_guidance else None
        network, weights = make_network(block, z, context, guidance), None if guidance is None else guidance.weights(z)
        for t in range(z.shape[1]):
            rows = network(x, t)
            log_scale, shift = rows[0] if weights is None else _guided(flow.guidance, [w[t] for w in weights], *rows)
            x[:, t] = z[:, t] * log_scale.exp() + shift
        return x

    return flow.from_tokens(flow.map_blocks_reversed(flow.prior_tokens(z), solve))


def _guided(guidance: Any, weights: Sequence[Tensor], params: ScaleShift, free: ScaleShift) -> ScaleShift:
    """Returns log-scale and shift of an entry under guidance, by the rule of `Guidance`."""
    (log_scale, shift), (free_log_scale, free_shift), (w, w_shift) = params, free, weights
    if guidance.rule == "linear":
        return log_scale + w * (log_scale - free_log_scale), shift + w_shift * (shift - free_shift)
    ratio = (log_scale - free_log_scale).exp().clamp(max=1).square()
    precision = 1 + w - w * ratio
    return log_scale - precision.log() / 2, ((1 + w) * shift - w * ratio * free_shift) / precision


def _cached_networks(block: TarFlowBlock, z: Tensor, context: Tensor | None, guidance: Guidance | None) -> _Network:
    networks = [CachedNetwork(block, context, 1.0)]
    if guidance is not None:
        networks.append(CachedNetwork(block, None, guidance.attn_temperature))
    return lambda x, t: [network(x, t) for network in networks]


class CachedNetwork:
    """A TarFlow block's network that is evaluated token by token under one context."""

    def __init__(self, block: TarFlowBlock, context: Tensor | None, temperature: float) -> None:
        self.block = block
        self.position_embedding = block.permutation(block.pos_embed, dim=0)
        embedded = block.embed_context(context)
        self.context = None if embedded is None else embedded.to(self.position_embedding.dtype)
        self.temperature = temperature
        self.layers = [_CachedLayer(layer) for layer in block.attn_blocks]

    def __call__(self, x: Tensor, t: int) -> ScaleShift:
        """Returns log-scale and shift (N, C) of entry `t`, in the dtype of `x` (N, T, C); to be called in order."""
        if t == 0:
            return torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        token = x[:, t - 1 : t].to(self.position_embedding.dtype)
        h = self.block.proj_in(token) + self.position_embedding[t - 1 : t]
        if self.context is not None:
            h = h + (self.context if self.context.shape[1] == 1 else self.context[:, t - 1 : t])
        for layer in self.layers:
            h = layer.step(h, self.temperature)
        out = self.block.proj_out(h)[:, 0].to(x.dtype)
        if not self.block.nvp:
            return torch.zeros_like(out), out
        log_scale, shift = out.chunk(2, dim=-1)
        return log_scale, shift


@dataclass
class _CachedLayer:
    """A transformer layer with the keys and values (N, heads, 1, head_dim) of the tokens before."""

    module: TransformerLayer
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def step(self, h: Tensor, temperature: float) -> Tensor:
        """Passes one token (N, 1, width) through the layer; it attends to all tokens before."""
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


class _RotaryNetwork:
    """A STARFlow block's network that is evaluated token by token; under guidance it has two rows for each sample."""

    def __init__(self, block: STARFlowBlock, z: Tensor, context: Tensor | None, guidance: Guidance | None) -> None:
        rotation = block.layer_weights()[0].rotation
        assert rotation is not None
        text, temperature = block.embed_prefix(context, len(z))[:, :-1], None
        if guidance is not None:
            text = torch.cat((text, block.embed_prefix(None, len(z))[:, :-1]))
            if guidance.attn_temperature != 1:
                temperatures = z.new_tensor((1.0, guidance.attn_temperature))
                temperature = temperatures.repeat_interleave(len(z)).view(-1, 1, 1, 1)
        heads = block.attn_blocks[0].attention.num_heads
        shape = (2, len(text), heads, len(rotation.cos), block.proj_in.out_features // heads)
        self.block, self.num_copies = block, len(text) // len(z)
        self.layers = [_RotaryLayer(layer, rotation, temperature, z.new_zeros(shape)) for layer in block.attn_blocks]
        if text.shape[1]:
            self._pass(text)

    def __call__(self, x: Tensor, t: int) -> list[ScaleShift]:
        block = self.block
        token = block.sos_embed.expand(len(x), -1, -1) if t == 0 else x[:, t - 1 : t].to(block.sos_embed.dtype)
        h = self._pass(block.proj_in(token.repeat(self.num_copies, 1, 1)))
        h = F.rms_norm(h, (h.shape[-1],), block.final_norm_weight(), 1e-6)
        out = block.proj_out(h)[:, 0].to(x.dtype)
        scale, shift = (block.soft_clip * torch.tanh(out / block.soft_clip)).chunk(2, dim=-1)
        log_scale = F.softplus(scale + math.log(math.e - 1)).log()
        return [*zip(log_scale.chunk(self.num_copies), shift.chunk(self.num_copies), strict=True)]

    def _pass(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer.step(h)
        return h


@dataclass
class _RotaryLayer:
    """A transformer layer with rotary positions; its cache (2, N, heads, positions, head_dim) has unrotated keys."""

    module: TransformerLayer
    rotation: Rotation
    temperature: Tensor | None
    cache: Tensor
    length: int = 0

    def step(self, h: Tensor) -> Tensor:
        """Passes tokens (N, n, width) through the layer; they attend to the tokens before."""
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


def _masked_network(block: MAFBlock, z: Tensor, labels: Tensor | None, guidance: Guidance | None) -> _Network:
    networks = [block.masked_layers(labels)] + ([] if guidance is None else [block.masked_layers()])

    def network(x: Tensor, t: int) -> list[ScaleShift]:
        passes = (run_masked_layers(x, layers) for layers in networks)
        return [(log_scale[:, t], shift[:, t]) for log_scale, shift in passes]

    return network


_ORIGINALS: tuple[tuple[type[Flow], str, Callable[..., _Network]], ...] = (
    (TarFlow, GROWING_CACHE, _cached_networks),
    (STARFlow, TOKEN_LOOP, _RotaryNetwork),
    (MAF, FULL_PASSES, _masked_network),
)


def original_sampler(flow: Flow) -> tuple[str, OriginalSampler]:
    """Returns the name and the sampler of a flow's original code.

    The names are "growing cache" for a TarFlow, "token loop" for a STARFlow and "full passes" for a MAF. Any other flow
    has this library's own loop, "sequential".
    """
    check_flow(flow)
    for flow_type, name, make_network in _ORIGINALS:
        if isinstance(flow, flow_type):
            return name, partial(_sample, make_network)
    return SEQUENTIAL, lambda flow, z, context: sequential_samples(flow, z, context).x


def sequential_samples(
    flow: Flow, z: Tensor, context: Tensor | None, settings: SamplingSettings | None = None
) -> Samples:
    """Draws samples by this library's own loop, without certificates or densities."""
    return sample(
        flow, latents=z, context=context, settings=settings, strategy=SEQUENTIAL, certify=False, log_prob=False
    )
