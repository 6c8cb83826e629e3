"""Shapes of flows: the values that every config has, and the configs of TarFlow and MAF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

from jacobiflow.checks import check_count, check_flag, check_kind, check_number, convert_numbers, short
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import Permutation

_MAX_SIZE = 2**20  # a larger one is a slip


class FlowConfig(Protocol):
    """The shape of a flow: a frozen dataclass of numbers, strings and tuples with these among its values.

    A flow over images has `in_channels` and `image_size`, too. `num_classes` is 0 for a flow without classes, and
    `noise_std` for data without Gaussian noise.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def token_channels(self) -> int: ...


@dataclass(frozen=True)
class TarFlowConfig:
    """Shape of a `TarFlow` over images.

    Args:
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
        patch_size: Height and width of a patch, which is a token; divides `image_size`.
        channels: Width of the transformers.
        num_blocks: Affine blocks, each with a transformer.
        layers_per_block: Layers of a transformer.
        num_classes: 0 for an unconditional flow.
        nvp: Whether blocks scale ("non-volume-preserving"). Without it they shift only, and the flow learns the
            variance of its prior.
        head_dim: Channels of an attention head; divides `channels`.
        expansion: Hidden units of a layer's perceptron, in multiples of `channels`.
        noise_std: Gaussian noise of the training images, which denoising removes; 0 for uniform dequantisation.

    Example:
        >>> config = jf.TarFlowConfig(1, 8, 2, channels=64, num_blocks=4, layers_per_block=2)
        >>> config.num_tokens, config.token_channels
        (16, 4)
    """

    in_channels: int
    image_size: int
    patch_size: int
    channels: int
    num_blocks: int
    layers_per_block: int
    num_classes: int = 0
    nvp: bool = True
    head_dim: int = 64
    expansion: int = 4
    noise_std: float = 0.0
    context_channels: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.image_size % self.patch_size:
            raise InputValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        _check_heads(self.channels, self.head_dim)
        check_flag("nvp", self.nvp)
        check_number("noise_std", self.noise_std, give="0 or a positive standard deviation")

    @property
    def num_tokens(self) -> int:
        """T, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_channels(self) -> int:
        """C, the number of values in one patch."""
        return self.in_channels * self.patch_size**2

    def of_block(self, index: int) -> tuple[TarFlowConfig, Literal["identity", "flip"]]:
        """Returns the shape of a block, and the order in which it reads the tokens."""
        return self, "flip" if index % 2 else "identity"


Order = Literal["identity", "flip"] | tuple[int, ...]


@dataclass(frozen=True)
class TokenConfig:
    """Shape of a `TarFlow` over tokens: any sequence of vectors, such as the positions of atoms.

    Args:
        num_tokens: T.
        token_channels: C, the values of a token.
        channels: Width of the transformers; a tuple has one for each block.
        num_blocks: Affine blocks, each with a transformer.
        layers_per_block: Layers of a transformer; a tuple has one number for each block.
        num_classes: 0 for a flow without classes.
        context_channels: K, if the context is numbers (N, K) for each sample or (N, T, K) for each token; else 0.
        nvp, head_dim, expansion: See `TarFlowConfig`.
        orders: The order in which each block reads the tokens, over again if there are more blocks: "identity", "flip",
            or the indices of the tokens.

    Example:
        >>> config = jf.TokenConfig(22, 3, channels=64, num_blocks=4, layers_per_block=(2, 2, 2, 4))
        >>> flow = jf.TarFlow(config)
        >>> flow.encode(torch.zeros(5, 22, 3))[0].shape
        torch.Size([5, 22, 3])
    """

    num_tokens: int
    token_channels: int
    channels: int | tuple[int, ...]
    num_blocks: int
    layers_per_block: int | tuple[int, ...]
    num_classes: int = 0
    context_channels: int = 0
    nvp: bool = True
    head_dim: int = 64
    expansion: int = 4
    orders: tuple[Order, ...] = ("identity", "flip")
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self)
        check_flag("nvp", self.nvp)
        for name in ("channels", "layers_per_block"):
            sizes = getattr(self, name)
            for size in sizes if isinstance(sizes, tuple) else (sizes,):
                check_count(name, size, 1, _MAX_SIZE)
            if isinstance(sizes, tuple) and len(sizes) != self.num_blocks:
                raise InputValueError(f"{name}={short(sizes)}: give a number, or one for each of {self.num_blocks} blocks")
        for channels in self.channels if isinstance(self.channels, tuple) else (self.channels,):
            _check_heads(channels, self.head_dim)
        if self.num_classes and self.context_channels:
            raise InputValueError(
                f"num_classes={self.num_classes}, context_channels={self.context_channels}: the context is either "
                "classes or numbers; give one of them"
            )
        check_kind("orders", self.orders, tuple, 'a tuple of "identity", "flip" or tuples of indices')
        for order in self.orders:
            Permutation(order)
            if isinstance(order, tuple) and len(order) != self.num_tokens:
                raise InputValueError(f"orders: {short(order)}: give the indices of {self.num_tokens} tokens")

    def of_block(self, index: int) -> tuple[TokenConfig, Order]:
        """Returns the shape of a block, and the order in which it reads the tokens."""
        sizes = {name: _of_block(getattr(self, name), index) for name in ("channels", "layers_per_block")}
        return replace(self, num_blocks=1, **sizes), self.orders[index % len(self.orders)]


def _of_block(sizes: int | Sequence[int], index: int) -> int:
    return sizes if isinstance(sizes, int) else sizes[index]


def _check_heads(channels: int, head_dim: int) -> None:
    if channels % head_dim:
        raise InputValueError(f"head_dim={head_dim} does not divide channels={channels}")


@dataclass(frozen=True)
class MAFConfig:
    """Shape of a `MAF`.

    Args:
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
        hidden_features: Units of a hidden layer.
        num_blocks: Affine blocks, each with a masked network.
        hidden_layers: Hidden layers of a network.
        num_classes: 0 for an unconditional flow.
        logit_alpha: Pixels p in [0, 1] enter as the logit of alpha + (1 - 2 alpha) p, which is finite at both ends.

    Example:
        >>> jf.MAFConfig(1, 8, hidden_features=64, num_blocks=4).num_tokens
        64
    """

    in_channels: int
    image_size: int
    hidden_features: int
    num_blocks: int
    hidden_layers: int = 2
    num_classes: int = 0
    logit_alpha: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self)
        give = "a small positive number, below 0.5"
        check_number("logit_alpha", self.logit_alpha, math.ulp(0.0), give)
        if self.logit_alpha >= 0.5:
            raise InputValueError(f"logit_alpha={self.logit_alpha}: give {give}")

    @property
    def num_tokens(self) -> int:
        """T, the number of pixels, in all channels."""
        return self.in_channels * self.image_size**2

    @property
    def token_channels(self) -> int:
        """C: a token is one value."""
        return 1

    @property
    def noise_std(self) -> float:
        """0: a MAF is trained on uniformly dequantised images."""
        return 0.0


def _check_sizes(config: FlowConfig) -> None:
    convert_numbers(config)
    for entry in fields(config):
        if entry.type == "int":
            least = 0 if entry.name in ("num_classes", "context_channels") else 1
            check_count(entry.name, getattr(config, entry.name), least, _MAX_SIZE)
