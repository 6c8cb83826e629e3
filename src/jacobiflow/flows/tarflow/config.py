"""The shape of a TarFlow."""

from __future__ import annotations

from dataclasses import dataclass

from jacobiflow.checks import check_flag, check_number
from jacobiflow.errors import InputValueError
from jacobiflow.flows.config import check_sizes, check_totals


@dataclass(frozen=True)
class TarFlowConfig:
    """Shape of a TarFlow.

    `noise_std` records the Gaussian noise that the training images carried (0: uniform dequantisation); denoising
    needs it. `nvp` is the non-volume-preserving mode (per-token scales); without it the flow has shifts only and a
    learned prior variance.

    **Raises** `TypeError` for other kinds of values, `ValueError` where sizes do not divide, are not positive, or are
    above the limits of `jacobiflow.flows.config`.
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

    def __post_init__(self) -> None:
        sizes = ("in_channels", "image_size", "patch_size", "channels", "num_blocks", "layers_per_block")
        check_sizes(self, (*sizes, "head_dim", "expansion"))
        if self.image_size % self.patch_size:
            raise InputValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.channels % self.head_dim:
            raise InputValueError(f"head_dim={self.head_dim} does not divide channels={self.channels}")
        check_flag("nvp", self.nvp)
        check_number("noise_std", self.noise_std, give="0 or a positive standard deviation")
        check_totals(self, self.num_blocks * self.layers_per_block)

    @property
    def num_tokens(self) -> int:
        """T, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_channels(self) -> int:
        """C, the number of values in one patch."""
        return self.in_channels * self.patch_size**2
