"""What the configs of flows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol


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
    """**Raises** `ValueError` where a field of those `names` is not a positive whole number, or num_classes below 0."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}: give a positive whole number")
    if type(config.num_classes) is not int or config.num_classes < 0:
        raise ValueError(f"num_classes={config.num_classes!r}: give 0 for an unconditional flow, or the class count")
