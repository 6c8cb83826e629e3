"""TarFlow (arXiv 2412.06329): an autoregressive normalizing flow of causal transformer blocks over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.blocks.permutation import Permutation
from jacobiflow.errors import CheckpointError, first_line
from jacobiflow.models.checkpoints.folder import build, check_values
from jacobiflow.models.checkpoints.original import infer_config, read_original
from jacobiflow.models.config import TarFlowConfig, TokenConfig
from jacobiflow.models.flow import Flow, register_flow
from jacobiflow.models.transformer.block import TarFlowBlock
from jacobiflow.utils.files import atomic_path

if TYPE_CHECKING:
    from typing_extensions import Self


@register_flow
class TarFlow(Flow):
    """Stack of causal affine blocks over tokens, or over the patches of an image.

    The config says which: a `TokenConfig`, or a `TarFlowConfig` for images.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329.

    Example:
        >>> flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 2, channels=64, num_blocks=2, layers_per_block=1))
        >>> z, log_det = flow.encode(torch.zeros(3, 1, 8, 8))
        >>> z.shape, log_det.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
    """

    model_type = "tarflow"
    config_types = (TarFlowConfig, TokenConfig)
    block_type = TarFlowBlock
    config: TarFlowConfig | TokenConfig
    blocks: Sequence[TarFlowBlock]

    def make_block(self, index: int) -> TarFlowBlock:
        return TarFlowBlock(self.config, Permutation(self.config.of_block(index).order), index)

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int,
        patch_size: int = 2, head_dim: int = 64, volume_preserving: bool = False, noise_std: float = 0.1,
    ) -> TarFlowConfig:  # fmt: skip
        """Makes a config; `channels` is the transformers' width."""
        return TarFlowConfig(
            in_channels, image_size, patch_size, channels, num_blocks=blocks, layers_per_block=layers,
            num_classes=num_classes, nvp=not volume_preserving, head_dim=head_dim, noise_std=noise_std,
        )  # fmt: skip

    @classmethod
    def from_original(cls, path: str | Path, config: TarFlowConfig | TokenConfig | None = None) -> Self:
        """Loads a `.pth` state dict of the TarFlow code, in eval mode; float16 becomes float32.

        The codes that this reads are the original one, SBG's, and forks of them with the same names. Without a config
        the flow is one over tokens, of the shapes in the file: these do not tell the layout of images, nor the number
        of heads, which have 64 channels each.
        """
        state = read_original(path)
        config = infer_config(state, str(path)) if config is None else config
        cls.check_config(config)
        state.setdefault("var", torch.ones(config.num_tokens, config.token_channels))  # which SBG's files lack
        return build(cls, config, state, str(path))

    def to_original(self, path: str | Path) -> None:
        """Writes a `.pth` state dict that the original TarFlow code loads strictly, causal masks included."""
        config = self.config
        if (config.head_dim, config.expansion) != (64, 4) or self.blocks[0].proj_context is not None:
            raise CheckpointError(
                f"head_dim={config.head_dim}, expansion={config.expansion}, "
                f"context_channels={config.context_channels}: the original code has 64, 4 and 0 only; save a model "
                "folder instead"
            )
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        check_values(state, f"{path}: not written")
        mask = torch.ones(config.num_tokens, config.num_tokens).tril()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial_file:
                torch.save(state | {f"blocks.{i}.attn_mask": mask for i in range(config.num_blocks)}, partial_file)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error

    @property
    def learns_prior(self) -> bool:
        return not self.config.nvp

    def to_tokens(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n t d"]:
        if not isinstance(self.config, TarFlowConfig):
            return x
        return F.unfold(x, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)

    def from_tokens(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n ..."]:
        if not isinstance(self.config, TarFlowConfig):
            return tokens
        side, size = self.config.image_size, self.config.patch_size
        return F.fold(tokens.transpose(1, 2), (side, side), size, stride=size)
