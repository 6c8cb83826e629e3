"""Parts that the configs of flows share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_count, check_fields, check_number, declared_types, format_value

_MAX_SIZE = 2**20  # The largest number of tokens, units and the like; a larger one is a slip.
_MAX_LAYERS = 2**10  # The largest number of layers in all blocks, which take seconds to build.


class FlowConfig(Protocol):
    """The shape of a flow: a frozen dataclass of numbers, strings and tuples with these among its values.

    A flow over images also has `in_channels` and `image_size`. `num_classes` is 0 for a flow without classes.
    `noise_std` is 0 for data without Gaussian noise.
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
    def token_dim(self) -> int: ...


Order = Literal["identity", "flip"] | tuple[int, ...]
"""The order in which a block reads the tokens, see `Permutation`."""


class BlockShape(NamedTuple):
    """Width and layers of a block's transformer, and the order in which it reads the tokens."""

    width: int
    layers: int
    order: Order


class PatchConfig:
    """Base of configs of images whose tokens are square patches."""

    in_channels: int
    image_size: int
    patch_size: int
    noise_std: float

    @property
    def num_tokens(self) -> int:
        """T, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """C, the number of values in one patch."""
        return self.in_channels * self.patch_size**2

    def check_patches(self) -> None:
        """Raises ValueError if patches do not tile the image, or a field has another type than it declares."""
        if self.image_size % self.patch_size:
            whole = self.image_size // self.patch_size * self.patch_size
            divisors = [side for side in range(2, 17) if self.image_size % side == 0] or [1]
            divisor = min(divisors, key=lambda side: abs(side - self.patch_size))
            remedy = f"give {divisor}" + f", or images of {whole}" * (whole > 0)
            message = f"does not divide the side of the images, {self.image_size}; {remedy}"
            raise InputValueError(message, argument="patch_size", value=self.patch_size)
        check_number("noise_std", self.noise_std, expected="0 or a positive standard deviation")
        check_fields(self)


def check_heads(width: int | tuple[int, ...], head_dim: int) -> None:
    """Raises ValueError if `head_dim` does not divide the width of every block."""
    for size in width if isinstance(width, tuple) else (width,):
        if size % head_dim:
            nearest = max(size // head_dim, 1) * head_dim
            message = f"is not a multiple of head_dim, {head_dim}; give {nearest}, or a head_dim that divides it"
            raise InputValueError(message, argument="width", value=size)


def size_of_block(sizes: int | tuple[int, ...], index: int) -> int:
    """Returns the size of a block, given one for all blocks or one for each."""
    return sizes if isinstance(sizes, int) else sizes[index]


def check_sizes(config: FlowConfig) -> None:
    """Checks that the sizes of a config are positive and not too large to build.

    A size whose default is 0 may be 0. A tuple of sizes has one for each block.
    """
    types = declared_types(type(config))
    for entry in fields(config):
        sizes, declared = getattr(config, entry.name), types[entry.name]
        if int not in (declared, *get_args(declared)):
            continue
        if isinstance(sizes, tuple) and declared is not int:
            if len(sizes) != config.num_blocks:
                message = f"give a number, or one for each of {config.num_blocks} blocks"
                raise InputValueError(message, argument=entry.name, value=format_value(sizes))
            for size in sizes:
                check_count(entry.name, size, maximum=_MAX_SIZE)
        else:
            check_count(entry.name, sizes, 0 if entry.default == 0 else 1, _MAX_SIZE)
    for name in ("num_tokens", "token_dim"):
        check_count(name, getattr(config, name), 0, _MAX_SIZE)
    layers = getattr(config, "layers_per_block", getattr(config, "hidden_layers", 1))
    total = sum(layers) if isinstance(layers, tuple) else layers * config.num_blocks
    if total > _MAX_LAYERS:
        raise InputValueError(
            f"{total:,} layers in {config.num_blocks:,} blocks: the limit is {_MAX_LAYERS:,}; give fewer"
        )


def resolve_rate(config: FlowConfig, rate: float, name: str = "denoise") -> float:
    """Returns the rate of denoising as a Python number; raises ValueError if the flow has no noise to remove."""
    rate = check_number(name, rate, expected="0 (off) or a positive rate")
    if rate and not config.noise_std:
        message = "the training images had no noise, or it is not known; give 0, or convert again with --noise-std"
        raise InputValueError(message, argument=name, value=rate)
    return rate
