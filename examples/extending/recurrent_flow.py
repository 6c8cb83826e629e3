"""A kind of flow: rows of an image are tokens, read by a gated recurrent network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacobiflow.models import Context, Flow, FlowBlock, Permutation, register_flow

NO_CONTEXT = Context()


@dataclass(frozen=True)
class RecurrentConfig:
    """Shape of a `RecurrentFlow`, whose networks have `width` units."""

    in_channels: int
    image_size: int
    width: int
    num_blocks: int
    num_classes: int = 0
    noise_std: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.image_size

    @property
    def token_dim(self) -> int:
        return self.in_channels * self.image_size


class RecurrentBlock(FlowBlock):
    """Log-scale and shift of row t from the state after row t-1, in the cache."""

    is_pure = True

    def __init__(self, config: RecurrentConfig, permutation: Permutation) -> None:
        super().__init__()
        self.permutation = permutation
        states = torch.zeros(config.num_classes + 1, config.width)
        self.start = nn.Parameter(states)  # before row 0; the last: without a class
        sizes = config.token_dim, config.width
        self.network = nn.GRU(*sizes, batch_first=True)
        self.out = nn.Linear(config.width, 2 * config.token_dim)
        nn.init.zeros_(self.out.weight)

    def init_cache(self, z: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        states = self.start.new_zeros(len(z), z.shape[1], self.start.shape[1])
        labels = context.values
        states[:, 0] = self.start[-1 if labels is None else labels.clamp(min=-1)]
        return states

    def affine(
        self, x: Tensor, start: int, stop: int, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        first = max(start - 1, 0)
        if stop - 1 > first:
            state = cache[:, first].unsqueeze(0).contiguous()
            cache[:, first + 1 : stop] = self.network(
                x[:, first : stop - 1].to(cache.dtype), state
            )[0]
        scale, shift = self.out(cache[:, start:stop]).to(x.dtype).chunk(2, dim=-1)
        return scale.tanh(), shift


@register_flow
class RecurrentFlow(Flow):
    """A stack of recurrent blocks over the rows of an image."""

    model_type, config_types, block_type = (
        "recurrent",
        (RecurrentConfig,),
        RecurrentBlock,
    )

    @classmethod
    def config_from_options(
        cls,
        *,
        width: int,
        blocks: int,
        layers: int,
        noise_std: float = 0.1,
        **sizes: Any,
    ) -> Any:
        return RecurrentConfig(
            width=width, num_blocks=blocks, noise_std=noise_std, **sizes
        )

    def to_tokens(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        channels, *_ = self.require_images()
        return tokens.unflatten(2, (channels, -1)).transpose(1, 2)
