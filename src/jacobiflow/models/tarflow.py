"""TarFlow (arXiv 2412.06329): an autoregressive normalizing flow of causal transformer blocks over tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.errors import CheckpointError, InputValueError, first_line
from jacobiflow.models.checkpoints.original import OriginalShapes, one_or_all, read_name, read_original
from jacobiflow.models.checkpoints.tensors import build, check_values
from jacobiflow.models.config import BlockShape, Order, PatchConfig, check_heads, check_sizes, size_of_block
from jacobiflow.models.contexts import ContextKind, Numbers, embed_classes
from jacobiflow.models.flow import Flow
from jacobiflow.models.registry import register_flow
from jacobiflow.models.transformer.attention import TransformerLayer
from jacobiflow.models.transformer.block import TransformerBlock
from jacobiflow.utils.checks import check_fields, check_kind, format_value
from jacobiflow.utils.deprecation import renamed_arguments
from jacobiflow.utils.files import atomic_path

if TYPE_CHECKING:
    from typing_extensions import Self


@renamed_arguments(channels="width")
@dataclass(frozen=True)
class TarFlowConfig(PatchConfig):
    """Shape of a `TarFlow` over images.

    Args:
        image_size: Height and width of an image, in pixels.
        patch_size: Height and width of a patch, which is a token; divides `image_size`.
        width: Width of the transformers. Each block has one transformer.
        num_classes: Number of classes; 0 for an unconditional flow.
        nvp: Whether blocks scale ("non-volume-preserving"). Without it they shift only, and the flow learns the
            variance of its prior.
        head_dim: Channels of an attention head; divides `width`.
        expansion: Hidden units of a layer's perceptron, in multiples of `width`.
        noise_std: Standard deviation of the training images' Gaussian noise, which denoising removes; 0 for uniform
            dequantisation.

    Example:
        >>> config = jf.TarFlowConfig(1, 8, 2, width=64, num_blocks=4, layers_per_block=2)
        >>> config.num_tokens, config.token_dim
        (16, 4)
    """

    in_channels: int
    image_size: int
    patch_size: int
    width: int
    num_blocks: int
    layers_per_block: int
    num_classes: int = 0
    nvp: bool = True
    head_dim: int = 64
    expansion: int = 4
    noise_std: float = 0.0
    context_dim: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        self.check_patches()
        check_heads(self.width, self.head_dim)

    def of_block(self, index: int) -> BlockShape:
        """Returns the shape of a block."""
        return BlockShape(self.width, self.layers_per_block, "flip" if index % 2 else "identity")


@renamed_arguments(channels="width", token_channels="token_dim", context_channels="context_dim")
@dataclass(frozen=True)
class TokenConfig:
    """Shape of a `TarFlow` over tokens: any sequence of vectors, such as the positions of atoms.

    Args:
        num_tokens: T, the tokens of a sample.
        token_dim: C, the values of a token.
        width: Width of the transformers; a tuple has one for each block.
        num_blocks: Affine blocks, each with a transformer.
        layers_per_block: Layers of a transformer; a tuple has one number for each block.
        num_classes: 0 for a flow without classes.
        context_dim: K, if the context is numbers (N, K) for each sample or (N, T, K) for each token; else 0.
        nvp: Whether blocks scale. Without it they shift only.
        head_dim: Channels of an attention head; divides `width`.
        expansion: Hidden units of a layer's perceptron, in multiples of `width`.
        orders: The orders in which the blocks read the tokens, in turn: "identity", "flip", or indices of the tokens.

    Example:
        >>> config = jf.TokenConfig(22, 3, width=64, num_blocks=4, layers_per_block=(2, 2, 2, 4))
        >>> flow = jf.TarFlow(config)
        >>> flow.encode(torch.zeros(5, 22, 3))[0].shape
        torch.Size([5, 22, 3])
    """

    num_tokens: int
    token_dim: int
    width: int | tuple[int, ...]
    num_blocks: int
    layers_per_block: int | tuple[int, ...]
    num_classes: int = 0
    context_dim: int = 0
    nvp: bool = True
    head_dim: int = 64
    expansion: int = 4
    orders: tuple[Order, ...] = ("identity", "flip")
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_sizes(self)
        check_heads(self.width, self.head_dim)
        if self.num_classes and self.context_dim:
            raise InputValueError(
                f"num_classes={self.num_classes}, context_dim={self.context_dim}: the context is either "
                "classes or numbers; give one of them"
            )
        check_kind("orders", self.orders, tuple, 'a tuple of "identity", "flip" or tuples of indices')
        if not self.orders:
            raise InputValueError('orders=(): give one or more, such as ("identity", "flip")')
        for order in self.orders:
            Permutation(order)
            if isinstance(order, tuple) and len(order) != self.num_tokens:
                raise InputValueError(f"orders: {format_value(order)}: give the indices of {self.num_tokens} tokens")
        check_fields(self)

    def of_block(self, index: int) -> BlockShape:
        """Returns the shape of a block."""
        width, layers = (size_of_block(sizes, index) for sizes in (self.width, self.layers_per_block))
        return BlockShape(width, layers, self.orders[index % len(self.orders)])


class TarFlowBlock(TransformerBlock):
    """One causal affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    Its context is labels (B,) if the config has classes. If it has `context_dim`, K, it is numbers (B, K) for each
    sample, or (B, T, K) for each token in the order of the data, whose projection is added to the tokens' embeddings.
    """

    attn_blocks: Sequence[TransformerLayer]

    def __init__(self, config: TarFlowConfig | TokenConfig, permutation: Permutation, index: int = 0) -> None:
        width, layers, _ = config.of_block(index)
        super().__init__(config.num_tokens, config.nvp, permutation)
        self.proj_in = nn.Linear(config.token_dim, width)
        self.pos_embed = nn.Parameter(torch.randn(config.num_tokens, width, device=None) * 1e-2)
        classes, numbers = config.num_classes, config.context_dim
        self.class_embed = nn.Parameter(torch.randn(classes, 1, width, device=None) * 1e-2) if classes else None
        self.proj_context = nn.Linear(numbers, width) if numbers else None
        self.attn_blocks = nn.ModuleList(  # type: ignore[assignment]
            TransformerLayer(width, config.head_dim, config.expansion) for _ in range(layers)
        )
        self.proj_out = nn.Linear(width, config.token_dim * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)

    def positions(self) -> Float[Tensor, "t w"]:
        return self.permutation(_widen(self.pos_embed), dim=0) + self.proj_in.bias

    def embed_context(self, values: Tensor | None) -> Float[Tensor, "#b #t w"] | None:
        if self.proj_context is None:
            return embed_classes(None if self.class_embed is None else _widen(self.class_embed), values)
        Numbers(self.num_tokens, self.proj_context.in_features).check(values)
        weight, bias = map(_widen, self.proj_context.parameters())
        projected = F.linear(values.to(weight.dtype), weight, bias)  # type: ignore[union-attr]
        return projected.unsqueeze(1) if projected.ndim == 2 else self.permutation(projected)


def _widen(tensor: Tensor) -> Tensor:
    """Converts a small parameter of a 16-bit network to float32, in which the exact loop computes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@register_flow
class TarFlow(Flow):
    """Stack of causal affine blocks over tokens, or over the patches of an image.

    The config says which: a `TokenConfig`, or a `TarFlowConfig` for images.

    Reference: Zhai et al., Normalizing Flows are Capable Generative Models, arXiv 2412.06329.

    Example:
        >>> flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 2, width=64, num_blocks=2, layers_per_block=1))
        >>> z, log_det = flow.encode(torch.zeros(3, 1, 8, 8))
        >>> z.shape, log_det.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
    """

    model_type = "tarflow"
    config_types = (TarFlowConfig, TokenConfig)
    block_type = TarFlowBlock
    config: TarFlowConfig | TokenConfig
    blocks: Sequence[TarFlowBlock]

    @property
    def context_kind(self) -> ContextKind:
        width = self.config.context_dim
        return Numbers(self.config.num_tokens, width) if width else super().context_kind

    def make_block(self, index: int) -> TarFlowBlock:
        return TarFlowBlock(self.config, Permutation(self.config.of_block(index).order), index)

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, width: int, blocks: int, layers: int,
        patch_size: int = 2, head_dim: int = 64, volume_preserving: bool = False, noise_std: float = 0.1,
    ) -> TarFlowConfig:  # fmt: skip
        """Makes a config; `width` is the transformers' width."""
        return TarFlowConfig(
            in_channels, image_size, patch_size, width, num_blocks=blocks, layers_per_block=layers,
            num_classes=num_classes, nvp=not volume_preserving, head_dim=head_dim, noise_std=noise_std,
        )  # fmt: skip

    @classmethod
    def from_original(cls, path: str | Path, config: TarFlowConfig | TokenConfig | None = None) -> Self:
        """Loads a `.pth` state dict of the TarFlow code, in eval mode; float16 becomes float32.

        If the config has noise, the flow recommends denoising at rate 1.
        It reads files of the original code, of SBG's, and of forks of them with the same names. Without a config the
        flow is one over images if the file has its original name, such as afhq_model_8_768_8_8_0.07.pth, which has the
        patch size and the noise, and else one over tokens. Heads have 64 channels each, which shapes do not tell.
        """
        state = read_original(path)
        config = cls.infer_config(state, str(path)) if config is None else config
        cls.check_config(config)
        state.setdefault("var", torch.ones(config.num_tokens, config.token_dim, device="cpu"))  # Files of SBG lack it.
        flow = build(cls, config, state, str(path))
        if config.noise_std:
            flow.recommended = SamplingSettings(denoise=1.0)
        return flow

    @staticmethod
    def infer_config(
        state: Mapping[str, Tensor], source: str, patch_size: int | None = None
    ) -> TarFlowConfig | TokenConfig:
        """Reads the config of a flow over tokens from shapes, or of one over square images of patches of `patch_size`.

        The default of `patch_size`, and the noise, are those in the name of the file `source` if its other sizes are
        those of the shapes. `head_dim` is 64. A CheckpointError begins with `source`.
        """
        shapes = OriginalShapes(state, source, "TarFlow")
        num_tokens, _ = shapes.shape("blocks.0.pos_embed", 2)
        _, token_dim = shapes.shape("blocks.0.proj_in.weight", 2)
        outputs, _ = shapes.shape("blocks.0.proj_out.weight", 2)
        sizes = shapes.transformer_sizes()
        classes, context = "blocks.0.class_embed", "blocks.0.proj_context.weight"
        config = TokenConfig(
            num_tokens=num_tokens,
            token_dim=token_dim,
            width=sizes.width,
            num_blocks=len(sizes.layers),
            layers_per_block=one_or_all(sizes.layers),
            num_classes=shapes.shape(classes, 3)[0] if classes in state else 0,
            context_dim=shapes.shape(context, 2)[1] if context in state else 0,
            nvp=outputs == 2 * token_dim,
            expansion=sizes.expansion,
        )
        named, of_shapes = read_name(source), (config.width, config.num_blocks, config.layers_per_block)
        if named is None or (named.width, named.blocks, named.layers) != of_shapes:
            return config if patch_size is None else _image_config(config, source, patch_size)
        image_config = _image_config(config, source, named.patch_size if patch_size is None else patch_size)
        return replace(image_config, noise_std=named.noise_std)

    def to_original(self, path: str | Path) -> None:
        """Writes a `.pth` state dict that the original TarFlow code loads strictly, causal masks included."""
        config = self.config
        if (config.head_dim, config.expansion) != (64, 4) or self.blocks[0].proj_context is not None:
            raise CheckpointError(
                f"head_dim={config.head_dim}, expansion={config.expansion}, "
                f"context_dim={config.context_dim}: the original code has 64, 4 and 0 only; save a model "
                "folder instead"
            )
        if [block.permutation for block in self.blocks] != [
            Permutation("flip" if i % 2 else "identity") for i in range(config.num_blocks)
        ]:
            raise CheckpointError(
                "orders: the original code reads tokens alternately as they are and reversed; save a model folder "
                "instead"
            )
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        check_values(state, f"{path}: not written")
        mask = torch.ones(config.num_tokens, config.num_tokens, device="cpu").tril()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial_file:
                torch.save(state | {f"blocks.{i}.attn_mask": mask for i in range(config.num_blocks)}, partial_file)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error

    @property
    def learns_prior(self) -> bool:
        return not self.config.nvp

    def to_tokens(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n t c"]:
        if not isinstance(self.config, TarFlowConfig):
            return x
        return F.unfold(x, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)

    def from_tokens(self, tokens: Float[Tensor, "n t c"]) -> Float[Tensor, "n ..."]:
        if not isinstance(self.config, TarFlowConfig):
            return tokens
        side, size = self.config.image_size, self.config.patch_size
        return F.fold(tokens.transpose(1, 2), (side, side), size, stride=size)


def _image_config(config: TokenConfig, source: str, patch_size: int) -> TarFlowConfig:
    """Returns the config of a flow over square images that has the tokens of `config`."""
    side, num_tokens, token_dim = math.isqrt(config.num_tokens), config.num_tokens, config.token_dim
    if side**2 != num_tokens:
        raise CheckpointError(
            f"{source}: {num_tokens} tokens, but square images have a square number of them; leave the patch size out "
            "for a flow over tokens"
        )
    if patch_size < 1 or token_dim % patch_size**2:
        raise CheckpointError(
            f"{source}: a patch size of {patch_size}: its square must divide the {token_dim} values of a token"
        )
    if not isinstance(config.width, int) or not isinstance(config.layers_per_block, int) or config.context_dim:
        raise CheckpointError(
            f"{source}: blocks of different sizes, or with a context of numbers; leave the patch size out"
        )
    return TarFlowConfig(
        token_dim // patch_size**2, side * patch_size, patch_size, config.width, config.num_blocks,
        config.layers_per_block, config.num_classes, config.nvp, expansion=config.expansion,
    )  # fmt: skip
