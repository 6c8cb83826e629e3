"""Values of flows: their shapes, the models of the GS-Jacobi paper, and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import Guidance, SamplingSettings
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.models.latents import MOST_SAMPLES
from jacobiflow.utils.checks import (
    check_count,
    check_flag,
    check_kind,
    check_number,
    convert_numbers,
    declared_types,
    format_value,
)

_MAX_SIZE = 2**20  # of tokens, channels and the like; a larger one is a slip
_MAX_LAYERS = 2**10  # of all blocks together, which take seconds to build


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


Order = Literal["identity", "flip"] | tuple[int, ...]


class BlockShape(NamedTuple):
    """Width and layers of a block's transformer, and the order in which it reads the tokens, see `Permutation`."""

    channels: int
    layers: int
    order: Order


@dataclass(frozen=True)
class TarFlowConfig:
    """Shape of a `TarFlow` over images.

    Args:
        image_size: Height and width of an image, in pixels.
        patch_size: Height and width of a patch, which is a token; divides `image_size`.
        channels: Width of the transformers, of which each block has one.
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
        check_sizes(self)
        if self.image_size % self.patch_size:
            raise InputValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        check_heads(self.channels, self.head_dim)
        check_flag("nvp", self.nvp)
        check_number("noise_std", self.noise_std, expected="0 or a positive standard deviation")

    @property
    def num_tokens(self) -> int:
        """T, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_channels(self) -> int:
        """C, the number of values in one patch."""
        return self.in_channels * self.patch_size**2

    def of_block(self, index: int) -> BlockShape:
        """Returns the shape of a block."""
        return BlockShape(self.channels, self.layers_per_block, "flip" if index % 2 else "identity")


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
        nvp: Whether blocks scale, and do not only shift.
        head_dim: Channels of an attention head; divides `channels`.
        expansion: Hidden units of a layer's perceptron, in multiples of `channels`.
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
        check_sizes(self)
        check_flag("nvp", self.nvp)
        check_heads(self.channels, self.head_dim)
        if self.num_classes and self.context_channels:
            raise InputValueError(
                f"num_classes={self.num_classes}, context_channels={self.context_channels}: the context is either "
                "classes or numbers; give one of them"
            )
        check_kind("orders", self.orders, tuple, 'a tuple of "identity", "flip" or tuples of indices')
        if not self.orders:
            raise InputValueError('orders=(): give one or more, such as ("identity", "flip")')
        for order in self.orders:
            Permutation(order)
            if isinstance(order, tuple) and len(order) != self.num_tokens:
                raise InputValueError(f"orders: {format_value(order)}: give the indices of {self.num_tokens} tokens")

    def of_block(self, index: int) -> BlockShape:
        """Returns the shape of a block."""
        channels, layers = (
            sizes if isinstance(sizes, int) else sizes[index] for sizes in (self.channels, self.layers_per_block)
        )
        return BlockShape(channels, layers, self.orders[index % len(self.orders)])


def check_heads(channels: int | tuple[int, ...], head_dim: int) -> None:
    """Raises ValueError if `head_dim` does not divide the channels of every block."""
    for width in channels if isinstance(channels, tuple) else (channels,):
        if width % head_dim:
            raise InputValueError(f"head_dim={head_dim} does not divide channels={width}")


@dataclass(frozen=True)
class MAFConfig:
    """Shape of a `MAF`.

    Args:
        image_size: Height and width of an image, in pixels.
        hidden_features: Units of a hidden layer, in the masked network of each block.
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
    token_channels: ClassVar[int] = 1  # a token is one value
    noise_std: ClassVar[float] = 0.0  # the images are uniformly dequantised

    def __post_init__(self) -> None:
        check_sizes(self)
        check_number("logit_alpha", self.logit_alpha, math.ulp(0.0), "a small positive number, below 0.5", 0.5)

    @property
    def num_tokens(self) -> int:
        """T, the number of pixels, in all channels."""
        return self.in_channels * self.image_size**2


def check_sizes(config: FlowConfig) -> None:
    """Converts the numbers of a config to Python's, and checks that its sizes are positive and not too large to build.

    A size whose default is 0 may be 0. A tuple of sizes has one for each block.
    """
    convert_numbers(config)
    types = declared_types(type(config))
    for entry in fields(config):
        sizes, declared = getattr(config, entry.name), types[entry.name]
        if int not in (declared, *get_args(declared)):
            continue
        if isinstance(sizes, tuple) and declared is not int:
            if len(sizes) != config.num_blocks:
                raise InputValueError(
                    f"{entry.name}={format_value(sizes)}: give a number, or one for each of {config.num_blocks} blocks"
                )
            for size in sizes:
                check_count(entry.name, size, maximum=_MAX_SIZE)
        else:
            check_count(entry.name, sizes, 0 if entry.default == 0 else 1, _MAX_SIZE)
    for name in ("num_tokens", "token_channels"):
        check_count(name, getattr(config, name), 0, _MAX_SIZE)
    layers = getattr(config, "layers_per_block", getattr(config, "hidden_layers", 1))
    total = sum(layers) if isinstance(layers, tuple) else layers * config.num_blocks
    if total > _MAX_LAYERS:
        raise InputValueError(
            f"{total:,} layers in {config.num_blocks:,} blocks: the limit is {_MAX_LAYERS:,}; give fewer"
        )


@dataclass(frozen=True)
class Preset:
    """A model of the paper with the settings of its tables 3 and 4.

    Args:
        source: The hub repository and file of the authors' weights, for `TarFlow.from_original`.
        recommended: The paper's guidance and rate of denoising.
        strategy: In the paper's notation, the fastest strategy whose FID is within 1% of sequential sampling's.

    Example:
        >>> preset = jf.PRESETS["afhq"]
        >>> preset.config.num_tokens, preset.strategy
        (1024, '[7-8-32-10]')
    """

    description: str
    source: str
    config: TarFlowConfig
    recommended: SamplingSettings
    strategy: str


_SOURCE = "encoreus/Transformer_Autoregressive_Flow"

PRESETS: dict[str, Preset] = {
    "img128cond": Preset(
        description="class-conditional ImageNet 128x128 (table 3a)",
        source=f"{_SOURCE}/imagenet_model_4_1024_8_8_0.15.pth",
        config=TarFlowConfig(3, 128, 4, 1024, 8, 8, num_classes=1000, noise_std=0.15),
        recommended=SamplingSettings(Guidance(1.5), denoise=0.97),
        strategy="[6-8-32-10]",
    ),
    "img64uncond": Preset(
        description="unconditional ImageNet 64x64 (table 3b)",
        source=f"{_SOURCE}/imagenet64_model_2_768_8_8_0.05.pth",
        config=TarFlowConfig(3, 64, 2, 768, 8, 8, num_classes=0, noise_std=0.05),
        recommended=SamplingSettings(Guidance(0.2, attn_temperature=0.3), denoise=0.9),
        strategy="[0/6-8-32-20]",
    ),
    "afhq": Preset(
        description="class-conditional AFHQ 256x256: cat, dog, wild (table 4a)",
        source=f"{_SOURCE}/afhq_model_8_768_8_8_0.07.pth",
        config=TarFlowConfig(3, 256, 8, 768, 8, 8, num_classes=3, noise_std=0.07),
        recommended=SamplingSettings(Guidance(3.4), denoise=1.4),
        strategy="[7-8-32-10]",
    ),
    "img64cond": Preset(
        description="class-conditional ImageNet 64x64 (table 4b)",
        source=f"{_SOURCE}/imagenet_model_4_1024_8_8_0.05.pth",
        config=TarFlowConfig(3, 64, 4, 1024, 8, 8, num_classes=1000, noise_std=0.05),
        recommended=SamplingSettings(Guidance(2.0), denoise=1.0),
        strategy="[0/7-16/8-10/13-6]",
    ),
}
"""The four models of the paper, by name: "img128cond", "img64uncond", "afhq" and "img64cond"."""


Labels = int | Sequence[int] | np.ndarray | Tensor
"""Classes of samples: one for all of them, or a sequence, array or tensor (N,) with one for each."""


ContextLike = Context | Labels | Tensor | str | Sequence[str]
"""Labels, numbers (N, K) for each sample or (N, T, K) for each token, prompts, or a `Context` of them."""


def as_labels(labels: Any, num: int) -> Int[Tensor, " n"]:
    """Converts labels to a tensor of int64 or int32; a single class is that of all `num` samples."""
    give, tensor = "a class, or a tensor or list (N,) of classes, whole numbers", labels
    if isinstance(labels, Tensor | np.ndarray):
        check_kind("labels", labels, Tensor | np.ndarray, give)
        check_count("number of labels", math.prod(labels.shape), 0, MOST_SAMPLES)  # before they are copied
    if not isinstance(labels, Tensor):
        try:
            tensor = torch.as_tensor(np.array(labels))  # a copy, since arrays may be read-only or have negative strides
        except (TypeError, ValueError) as error:
            raise InputTypeError(f"labels={format_value(labels)}: give {give}") from error
        tensor = tensor if tensor.ndim else tensor.repeat(num)
    if tensor.dtype in (torch.uint8, torch.int8, torch.int16):
        tensor = tensor.long()
    _check_vector("labels", tensor, give)
    return tensor


def embed_classes(table: Float[Tensor, "k ..."] | None, labels: Int[Tensor, " b"] | None) -> Tensor | None:
    """Looks up the row of a table for each label; the mean over classes for labels below 0 and for `None`.

    A label that is not a class raises ValueError. On a GPU only `Flow.check_labels` finds out.
    """
    if table is None:
        return None
    mean = table.mean(dim=0, keepdim=True)
    if labels is None:
        return mean
    _check_vector("context", labels, "a torch.Tensor (N,) of whole numbers")
    try:
        rows = table[labels.clamp(min=0)]
    except IndexError:
        raise InputValueError(f"context: {describe_unknown(labels, len(table))}") from None
    return torch.where((labels < 0).view(-1, *[1] * (table.ndim - 1)), mean, rows)


def _check_vector(name: str, labels: Any, give: str) -> None:
    check_kind(name, labels, Tensor, give)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"{name}={format_value(labels)}: give {give}")
    if labels.ndim != 1:
        raise InputValueError(f"{name}={format_value(labels)}: give {give}")


def describe_unknown(labels: Int[Tensor, " n"], num_classes: int) -> str:
    """Says which of the labels is not a class."""
    return f"label {int(labels.max())}: this flow has classes 0 to {num_classes - 1} (below 0: no class)"
