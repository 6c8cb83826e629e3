"""TarFlow (arXiv 2412.06329): an autoregressive normalizing flow of causal transformer blocks over image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.checks import check_kind, check_path
from jacobiflow.flows.base import (
    AffineFrontPerSample,
    ExactInverse,
    Extrapolation,
    FlowBlock,
    KeepsNothing,
    LowPrecision,
    check_input,
)
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.labels import embed_classes
from jacobiflow.flows.permutation import Permutation
from jacobiflow.flows.registry import register
from jacobiflow.flows.tarflow import recurrence
from jacobiflow.flows.tarflow.attention import (
    AttentionBlock,
    Fed,
    KeyValues,
    Parameters,
    causal_mask,
    transformer_layer,
)
from jacobiflow.flows.tarflow.cache import TarFlowCache
from jacobiflow.flows.tarflow.config import TarFlowConfig
from jacobiflow.flows.tarflow.original import check_masks, infer_config, read_original, take_masks, write_original
from jacobiflow.memory import keep_freed_memory

if TYPE_CHECKING:
    from typing_extensions import Self

_TOKENS_AT_A_TIME = 3200


class TarFlowBlock(FlowBlock, AffineFrontPerSample, LowPrecision, ExactInverse, KeepsNothing):
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

    def forward(
        self, x: Float[Tensor, "b t c"], labels: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"]]:
        """Log-scale and shift of every entry, from one parallel pass over `x`."""
        proj_in, proj_out = (self.proj_in.weight, self.proj_in.bias), (self.proj_out.weight, self.proj_out.bias)
        h = _embed(x[:, :-1], proj_in, self.permutation(self.pos_embed, dim=0)[:-1], self.embed_classes(labels))
        for layer in self.attn_blocks:
            h = layer(h)
        return self._read_out(h, x, proj_out, first=True)

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
        keep_freed_memory(weight.device)
        shape = (z.shape[0], attention.num_heads, self.num_tokens, weight.shape[1] // attention.num_heads)
        query_scale = None if attn_temperature is None else attn_temperature.to(weight).reciprocal().view(-1, 1, 1, 1)
        layers = tuple(KeyValues(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.attn_blocks)
        classes = self.embed_classes(context)
        return TarFlowCache(
            layers,
            tuple(layer.weights() for layer in self.attn_blocks),
            (self.proj_in.weight, self.proj_in.bias),
            (self.proj_out.weight, self.proj_out.bias),
            self.permutation(self.pos_embed, dim=0),
            None if classes is None else classes.expand(z.shape[0], -1, -1),
            causal_mask(self.num_tokens, weight),
            query_scale,
        )

    def affine(
        self, x: Float[Tensor, "b t c"], start: int, stop: int, cache: TarFlowCache
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """Log-scale and shift of entries [start, stop); feeds positions start-1 .. stop-2 and stores their keys."""
        rows = _rows_at_a_time(x, stop - start, cache)
        if rows < len(x):
            parts = [slice(first, first + rows) for first in range(0, len(x), rows)]
            found = [self.affine(x[part], start, stop, cache.each(lambda t, p=part: t[p])) for part in parts]  # type: ignore[misc]
            log_scales, shifts = zip(*found, strict=True)
            return torch.cat(log_scales), torch.cat(shifts)
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

    def take(self, cache: TarFlowCache, rows: Int[Tensor, " m"]) -> TarFlowCache:
        """The cache of the samples `rows`."""
        return cache.each(lambda tensor: tensor[rows])

    def join(self, caches: Sequence[TarFlowCache]) -> TarFlowCache:
        """One cache for the samples of all `caches`, in order."""
        return TarFlowCache.join(caches)

    def output_weights(self) -> tuple[Float[Tensor, "c d"] | None, Float[Tensor, "c d"]]:
        """The halves of `proj_out`'s weight; see `AffineBlock.output_weights`."""
        weight = self.proj_out.weight.detach()
        if not self.nvp:
            return None, weight
        scale, shift = weight.chunk(2)
        return scale, shift

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


def _rows_at_a_time(x: Tensor, size: int, cache: TarFlowCache) -> int:
    """How many samples go through the network together: on a CPU no more than have their activations in reused memory.

    It is a fifth of the time at 64 samples; see `keep_freed_memory`.
    """
    if x.device.type != "cpu":
        return len(x)
    return max(_TOKENS_AT_A_TIME // size, 1)


def _embed(x: Tensor, proj_in: Parameters, pos_embedding: Tensor, class_embedding: Tensor | None) -> Tensor:
    h = F.linear(x.to(pos_embedding.dtype), *proj_in) + pos_embedding
    return h if class_embedding is None else h + class_embedding


def _hidden(tokens: Tensor, positions: slice | Tensor, end: int, cache: TarFlowCache) -> Tensor:
    """What the transformer makes of `tokens` at `positions`, which attend to the positions before `end`."""
    h = _embed(tokens, cache.proj_in, cache.pos_embedding[positions], cache.class_embedding)
    fed = Fed.of(positions, end, cache.mask, cache.query_scale)
    for weights, key_values in zip(cache.weights, cache.layers, strict=True):
        h = transformer_layer(h, weights, key_values, fed)
    return h


_MODEL_CARD = """\
---
{{ card_data }}
---

# TarFlow

A normalizing flow of causal transformer blocks ([arXiv 2412.06329](https://arxiv.org/abs/2412.06329)).
`jacobiflow.load` takes this folder, or its id on the hub.
"""


@register
class TarFlow(ImageFlow, tags=["tarflow"], model_card_template=_MODEL_CARD):
    """Stack of causal affine blocks over patches of an image, alternately in raster and in reverse order.

    **Arguments:**

    - `config`: the shape, a `TarFlowConfig`.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329.
    """

    model_type = "tarflow"
    config_type = TarFlowConfig
    block_type = TarFlowBlock
    config: TarFlowConfig
    blocks: Sequence[TarFlowBlock]

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__(config)

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int,
        patch_size: int = 2, head_dim: int = 64, volume_preserving: bool = False, noise_std: float = 0.1,
    ) -> TarFlowConfig:  # fmt: skip
        """A config from the options of `jacobiflow train`; `channels` is the transformers' width."""
        return TarFlowConfig(
            in_channels, image_size, patch_size, channels, num_blocks=blocks, layers_per_block=layers,
            num_classes=num_classes, nvp=not volume_preserving, head_dim=head_dim, noise_std=noise_std,
        )  # fmt: skip

    @classmethod
    def config_from_shapes(cls, state: Mapping[str, Tensor], config: TarFlowConfig) -> TarFlowConfig:
        """See `ImageFlow.config_from_shapes`; what a token holds is read by `in_channels` or else `patch_size`."""
        try:
            found = infer_config(state, head_dim=config.head_dim, in_channels=config.in_channels)
        except ValueError:
            found = infer_config(state, head_dim=config.head_dim, patch_size=config.patch_size)
        return replace(found, noise_std=config.noise_std)

    @classmethod
    def from_original(cls, path: str | Path, config: TarFlowConfig) -> Self:
        """The flow in a `.pth` state dict of the original TarFlow code, in eval mode; float16 becomes float32.

        The original code has heads of 64; shapes do not say another `head_dim`.

        **Raises** `CheckpointError`, a `ValueError`, where the file is not readable or does not fit `config`.
        """
        check_path("path", path)
        check_kind("config", config, TarFlowConfig, "a TarFlowConfig")
        state = read_original(path)
        masks = take_masks(state)
        flow = cls.from_state(config, state, str(path))
        check_masks(masks, config, str(path))
        return flow

    def to_original(self, path: str | Path) -> None:
        """Write a `.pth` state dict that the original TarFlow code loads strictly, causal masks included.

        **Raises** `CheckpointError`, a `ValueError`, where the original code has no such flow, a weight is not finite,
        or `path` cannot be written.
        """
        check_path("path", path)
        write_original(self.state_dict(), self.config, path)

    @property
    def learns_prior(self) -> bool:
        """Whether the flow has shifts only: then the prior's variance is learned."""
        return not self.config.nvp

    def to_tokens(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """The patches of `patchify`, and zeros: values only change their places."""
        return self.patchify(images), images.new_zeros(len(images))

    def to_images(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n c h w"]:
        """`unpatchify`."""
        return self.unpatchify(x)

    def patchify(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t d"]:
        """Images as sequences of patches in raster order."""
        size = self.config.patch_size
        return F.unfold(images, size, stride=size).transpose(1, 2)

    def unpatchify(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n c h w"]:
        """Inverse of `patchify`."""
        side, size = self.config.image_size, self.config.patch_size
        return F.fold(x.transpose(1, 2), (side, side), size, stride=size)
