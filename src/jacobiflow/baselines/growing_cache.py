"""A baseline to time against, and no solver of this library: the growing-cache loop of the original TarFlow code.

Every block solves its tokens one after another. Each network call feeds a single token; its keys and values join a
Python list, and every layer concatenates its whole list again for every token. Guidance makes two such calls per token,
one with labels and one without. `jacobiflow` needs none of this: it is written here, over the weights of a
`jacobiflow.TarFlow`, so that speed-ups are measured against a baseline which costs what the original code costs, and
which gives the same images. It looks labels up once per block, and was a few per cent faster than the original for it.

Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.baselines.peer import check_arguments
from jacobiflow.checks import check_kind
from jacobiflow.flows.labels import Labels
from jacobiflow.flows.tarflow import TarFlow, TarFlowBlock
from jacobiflow.flows.tarflow.attention import Attention, AttentionBlock
from jacobiflow.guidance import Guidance, in_force
from jacobiflow.inversion import invert, prior_tokens


@dataclass
class _Layer:
    """One transformer layer, and the keys and values (N, heads, 1, head_dim) of the tokens that it has been fed."""

    module: AttentionBlock
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def feed(self, h: Tensor, temperature: float) -> Tensor:
        """Pass one token (N, 1, channels) through the layer, attending to all tokens fed so far."""
        h = h + self._attend(self.module.attention, h, temperature)
        mlp = self.module.mlp
        return cast(Tensor, h + mlp.main(mlp.norm(h)))

    def _attend(self, attention: Attention, h: Tensor, temperature: float) -> Tensor:
        packed = attention.qkv(attention.norm(h))
        # (N, 1, 3 * heads * head_dim) to (N, 3 * heads, 1, head_dim): a third of the heads each for q, k and v.
        query, key, value = packed.view(len(h), 1, 3 * attention.num_heads, -1).transpose(1, 2).chunk(3, dim=1)
        self.keys.append(key)
        self.values.append(value)
        scale = query.shape[-1] ** -0.5 / temperature
        out = F.scaled_dot_product_attention(query, torch.cat(self.keys, 2), torch.cat(self.values, 2), scale=scale)
        return cast(Tensor, attention.proj(out.transpose(1, 2).reshape(h.shape)))


class Stream:
    """A block read token by token under one condition: with labels, or without."""

    def __init__(self, block: TarFlowBlock, labels: Tensor | None, temperature: float) -> None:
        self.block = block
        self.position_embedding = block.permutation(block.pos_embed, dim=0)
        self.class_embedding = block.embed_classes(labels)
        self.temperature = temperature
        self.layers = [_Layer(layer) for layer in block.attn_blocks]

    def feed(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Log-scale and shift (N, C) of the entry that follows `position`, in the dtype of `x` (N, T, C)."""
        token = x[:, position : position + 1].to(self.position_embedding.dtype)
        h = self.block.proj_in(token) + self.position_embedding[position : position + 1]
        if self.class_embedding is not None:
            h = h + self.class_embedding
        for layer in self.layers:
            h = layer.feed(h, self.temperature)
        out = self.block.proj_out(h)[:, 0].to(x.dtype)
        if not self.block.nvp:
            return torch.zeros_like(out), out
        log_scale, shift = out.chunk(2, dim=-1)
        return log_scale, shift


def _invert_block(block: TarFlowBlock, x: Tensor, labels: Tensor | None, guidance: Guidance | None) -> Tensor:
    """Solve one block for `x` (N, T, C), in the block's causal order; overwrites `x`."""
    last = x.shape[1] - 1
    conditional = Stream(block, labels, 1.0)
    unconditional = None if guidance is None else Stream(block, None, guidance.attn_temperature)
    for position in range(last):
        log_scale, shift = conditional.feed(x, position)
        if guidance is not None and unconditional is not None:
            weight = guidance.weight * (position + 1) / last if guidance.annealed else guidance.weight
            log_scale_free, shift_free = unconditional.feed(x, position)
            if guidance.on != "shift":
                log_scale = log_scale + weight * (log_scale - log_scale_free)
            if guidance.on != "scale":
                shift = shift + weight * (shift - shift_free)
        x[:, position + 1] = x[:, position + 1] * log_scale.exp() + shift
    return x


@torch.no_grad()
def growing_cache_sample(
    flow: TarFlow,
    z: Float[Tensor, "n t c"],
    labels: Labels | None = None,
    guidance: Guidance | None = None,
) -> Float[Tensor, "n c h w"]:
    """Images from latents, as the original code samples them; nothing is measured or certified.

    **Arguments:**

    - `flow`: the TarFlow whose weights are used, in their dtype and on their device.
    - `z`: standard normal latents (N, T, C), before the prior's scale. Not changed.
    - `labels`: a class per row (N,), as a tensor on that device, a list or an array; one class for all; or `None` for
        rows without a class.
    - `guidance`: a `Guidance`, or `None`; that or a weight of 0 makes no second call.

    **Returns:** images (N, C, H, W), not clipped.

    **Raises:** `ValueError` where `z` or `labels` do not fit the flow, `TypeError` for other kinds of arguments.
    """
    check_kind("flow", flow, TarFlow, "a TarFlow")
    classes = check_arguments(flow, z, labels, guidance)
    guidance = in_force(guidance)

    def solve(i: int, x: Tensor) -> Tensor:
        return _invert_block(flow.blocks[i], x, classes, guidance)

    return flow.to_images(invert(flow, prior_tokens(flow, z), solve))
