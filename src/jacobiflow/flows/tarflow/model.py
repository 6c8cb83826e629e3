"""TarFlow (arXiv 2412.06329): an autoregressive normalizing flow of causal transformer blocks over image patches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.errors import CheckpointError, first_line
from jacobiflow.files import write_beside
from jacobiflow.flows.base import Tokens
from jacobiflow.flows.config import TarFlowConfig
from jacobiflow.flows.folder import build, check_values
from jacobiflow.flows.image_flow import ImageFlow, Images, register
from jacobiflow.flows.tarflow.block import TarFlowBlock

if TYPE_CHECKING:
    from typing_extensions import Self

_MASK = re.compile(r"blocks\.\d+\.attn_mask")


@register
class TarFlow(ImageFlow):
    """Stack of causal affine blocks over patches of an image, alternately in raster and in reverse order.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329.

    Example:
        >>> flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 2, channels=64, num_blocks=2, layers_per_block=1))
        >>> z, log_det = flow.encode(torch.zeros(3, 1, 8, 8))
        >>> z.shape, log_det.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
    """

    model_type = "tarflow"
    config_type = TarFlowConfig
    block_type = TarFlowBlock
    config: TarFlowConfig
    blocks: Sequence[TarFlowBlock]

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
    def from_original(cls, path: str | Path, config: TarFlowConfig) -> Self:
        """Loads a `.pth` state dict of the original TarFlow code, in eval mode; float16 becomes float32."""
        return build(cls, config, read_original(path), str(path))

    def to_original(self, path: str | Path) -> None:
        """Writes a `.pth` state dict that the original TarFlow code loads strictly, causal masks included."""
        config = self.config
        if (config.head_dim, config.expansion) != (64, 4):
            raise CheckpointError(
                f"head_dim={config.head_dim}, expansion={config.expansion}: the original code has 64 and 4 only; "
                "save a model folder instead"
            )
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        check_values(state, f"{path}: not written")
        mask = torch.ones(config.num_tokens, config.num_tokens).tril()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with write_beside(path) as partial_file:
                torch.save(state | {f"blocks.{i}.attn_mask": mask for i in range(config.num_blocks)}, partial_file)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error

    @property
    def learns_prior(self) -> bool:
        return not self.config.nvp

    def to_tokens(self, images: Images) -> tuple[Tokens, Float[Tensor, " n"]]:
        size = self.config.patch_size
        return F.unfold(images, size, stride=size).transpose(1, 2), images.new_zeros(len(images))

    def to_images(self, x: Tokens) -> Images:
        side, size = self.config.image_size, self.config.patch_size
        return F.fold(x.transpose(1, 2), (side, side), size, stride=size)


def read_original(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors in a `.pth` file, without causal masks and without the prefix of DistributedDataParallel."""
    remedy = "give a file that torch.save(model.state_dict(), path) wrote"
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no exceptions, and damage raises nearly any
        raise CheckpointError(
            f"{path}: missing, damaged, or not only tensors; code in it was not run ({first_line(error)}); {remedy}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path}: not a dict of tensors; {remedy}")
    state = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return {name: tensor for name, tensor in state.items() if not _MASK.fullmatch(name)}


def infer_config(state: Mapping[str, Tensor], *, patch_size: int) -> TarFlowConfig:
    """Reads the config of a square image's flow from shapes, which do not tell `patch_size`; `head_dim` is 64."""
    try:
        channels, token_channels = state["blocks.0.proj_in.weight"].shape
        num_tokens, _ = state["blocks.0.pos_embed"].shape
        outputs, _ = state["blocks.0.proj_out.weight"].shape
        hidden, _ = state["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape
    except KeyError as error:
        raise CheckpointError(f"not the state dict of a TarFlow: no {error}") from None
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise CheckpointError(f"{num_tokens} tokens: a TarFlow of square images has a square number of them")
    if patch_size < 1 or token_channels % patch_size**2:
        raise CheckpointError(f"patch_size={patch_size}: its square must divide the {token_channels} values of a token")
    return TarFlowConfig(
        in_channels=token_channels // patch_size**2,
        image_size=side * patch_size,
        patch_size=patch_size,
        channels=channels,
        num_blocks=_count(state, r"blocks\.(\d+)\."),
        layers_per_block=_count(state, r"blocks\.0\.attn_blocks\.(\d+)\."),
        num_classes=len(state["blocks.0.class_embed"]) if "blocks.0.class_embed" in state else 0,
        nvp=outputs == 2 * token_channels,
        expansion=hidden // channels,
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Returns the number of different matches of the group in `pattern`."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
