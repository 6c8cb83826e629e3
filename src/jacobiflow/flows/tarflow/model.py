"""TarFlow (arXiv 2412.06329): an autoregressive normalizing flow of causal transformer blocks over image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.checks import check_kind, check_path
from jacobiflow.errors import InputError
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.registry import register
from jacobiflow.flows.tarflow.block import TarFlowBlock
from jacobiflow.flows.tarflow.config import TarFlowConfig
from jacobiflow.flows.tarflow.original import check_masks, infer_config, read_original, take_masks, write_original

if TYPE_CHECKING:
    from typing_extensions import Self

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
        except InputError:
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
