"""What the configs of flows share: what they say of their flow, and the largest sizes."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from jacobiflow.checks import check_count, convert_numbers
from jacobiflow.errors import InputValueError

MOST_CHANNELS = 2**20
MOST_BLOCKS, MOST_TOKENS = 1_000, 2**16
MOST_LAYERS = 10_000  # of all blocks together
MOST = MappingProxyType({
    "image_size": 4_096, "patch_size": 4_096, "num_blocks": MOST_BLOCKS, "layers_per_block": 1_000,
    "hidden_layers": 1_000, "num_tokens": MOST_TOKENS, "num_classes": 1_000_000,
})  # fmt: skip
"""The largest sizes by name, other ones being channels. A config with more is a slip or a trap: none is published, and
building the flow, or looping over its parts, would not end.
"""


class FlowConfig(Protocol):
    """What every config says of its flow: a frozen dataclass of numbers and strings with these among its values.

    `noise_std` is the Gaussian noise of the training images, 0 where they were dequantised uniformly.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def in_channels(self) -> int: ...
    @property
    def image_size(self) -> int: ...
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


def check_sizes(config: FlowConfig, names: Sequence[str]) -> None:
    """**Raises** `TypeError` where a field of those `names`, or num_classes, is no whole number, `ValueError` where it
    is not positive (num_classes may be 0) or above its limit in `MOST`.
    """
    convert_numbers(config)
    for name in names:
        check_count(name, getattr(config, name), most=MOST.get(name, MOST_CHANNELS))
    check_count("num_classes", config.num_classes, 0, MOST["num_classes"])


def check_totals(config: FlowConfig, layers: int) -> None:
    """**Raises** `ValueError` where tokens, their channels, or all blocks' `layers` together are above their limits."""
    for name, value, most in (
        ("tokens", config.num_tokens, MOST_TOKENS), ("channels of a token", config.token_channels, MOST_CHANNELS),
        ("layers in all blocks", layers, MOST_LAYERS),
    ):  # fmt: skip
        if value > most:
            raise InputValueError(f"config of {value:,} {name}: the limit is {most:,}; give smaller sizes")
