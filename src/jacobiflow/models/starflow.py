"""STARFlow (arXiv 2506.06276): a text-to-image flow of one deep and several shallow blocks with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.base import ScaleShift
from jacobiflow.blocks.guidance import Guidance, SamplingSettings
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.errors import CheckpointError, InputValueError
from jacobiflow.models.checkpoints.original import OriginalShapes, read_original
from jacobiflow.models.checkpoints.tensors import build
from jacobiflow.models.config import BlockShape, PatchConfig, check_heads, check_sizes, size_of_block
from jacobiflow.models.contexts import Texts
from jacobiflow.models.flow import Flow
from jacobiflow.models.registry import register_flow
from jacobiflow.models.text_encoder import EncodeText, t5_encoder, word_encoder
from jacobiflow.models.transformer.attention import Rotation, SharedParameters, TransformerLayer
from jacobiflow.models.transformer.block import TransformerBlock
from jacobiflow.models.transformer.cache import Projections
from jacobiflow.utils.checks import check_kind, check_positive
from jacobiflow.utils.deprecation import renamed_arguments

if TYPE_CHECKING:
    from typing_extensions import Self

_NORM_EPSILON = 1e-6  # Is added to the mean square in the final RMS norm.
_ROTARY_BASE = 10_000.0  # Pair k of n has the frequency base^(-k / n), in radians per position.
_TEXT_PAIRS = 8  # Pairs of width that are rotated by the position in the text.
_INVERSE_SOFTPLUS_OF_1 = math.log(math.e - 1)
_UNUSED_MODULES = ("feat_rope", "feat_rope_gen")  # Modules of the original code whose buffers are never read.


@renamed_arguments(channels="width", text_channels="text_dim")
@dataclass(frozen=True)
class STARFlowConfig(PatchConfig):
    """Shape of a `STARFlow`. The defaults are those of the released text-to-image weights, of 3.8 billion parameters.

    Its images are the data that it models, such as the latents of an autoencoder. Only the last block reads the text.

    Args:
        image_size: Height and width of an image.
        patch_size: Height and width of a patch, which is a token; divides `image_size`.
        width: Width of the transformers; a tuple has one for each block.
        layers_per_block: Layers of the transformer of each block.
        text_tokens: Tokens of a text; shorter ones are padded with zeros.
        text_dim: Values of a text token.
        head_dim: Channels of an attention head; divides `width`, and is 20 or a larger multiple of 4.
        expansion: Hidden units of a layer's perceptron, in multiples of `width`.
        soft_clip: The bound c of c tanh(a / c), for the outputs a of a transformer.
        noise_std: Standard deviation of the training images' Gaussian noise.
        text_encoder: The hub id of the T5 encoder of prompts.
        captions: In place of a T5 encoder, the training captions, for `word_encoder`.

    Example:
        >>> jf.STARFlowConfig().num_tokens, jf.STARFlowConfig().of_block(5)
        (1024, BlockShape(width=3072, layers=24, order='identity'))
    """

    in_channels: int = 4
    image_size: int = 32
    patch_size: int = 1
    width: int | tuple[int, ...] = 3072
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2, 2, 24)
    text_tokens: int = 128
    text_dim: int = 2048
    head_dim: int = 64
    expansion: int = 4
    soft_clip: float = 4.0
    noise_std: float = 0.3
    text_encoder: str = ""
    captions: tuple[str, ...] = ()
    num_classes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        give = "a tuple with a number for each block"
        check_kind("layers_per_block", self.layers_per_block, tuple, give)
        if not self.layers_per_block:
            raise InputValueError(f"layers_per_block=(): give {give}")
        check_sizes(self)
        self.check_patches()
        if self.head_dim % 4 or self.head_dim <= 2 * _TEXT_PAIRS:
            raise InputValueError(f"head_dim={self.head_dim}: give 20 or a larger multiple of 4")
        check_heads(self.width, self.head_dim)
        check_positive("soft_clip", self.soft_clip)
        if self.captions and self.text_encoder:
            raise InputValueError("give this or captions, not both", argument="text_encoder", value=self.text_encoder)

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self.layers_per_block)

    def of_block(self, index: int) -> BlockShape:
        """Returns the shape of a block; the first reads the tokens reversed, the second as they are, and so on."""
        width = size_of_block(self.width, index)
        return BlockShape(width, self.layers_per_block[index], "identity" if index % 2 else "flip")


class _RMSNorm(nn.Module):
    """The parameter w of (1 + w) h / rms(h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=None))


class STARFlowBlock(TransformerBlock):
    """One block of a `STARFlow`: z_t = (x_t - u_t) / sigma_t, where the transformer has read x_<t and the prefix.

    The prefix is the projection of a text, in the last block only, and of a learned start token. With the outputs a and
    b of the transformer, both clipped softly, sigma = softplus(a + log(e - 1)) and u = b. Rotary positions are the row
    and the column of the next token, in causal order, and the position in the text.
    """

    attn_blocks: Sequence[TransformerLayer]
    null_text: Tensor

    def __init__(self, config: STARFlowConfig, permutation: Permutation, index: int) -> None:
        width, layers, _ = config.of_block(index)
        super().__init__(config.num_tokens, True, permutation)
        self.head_dim, self.soft_clip = config.head_dim, config.soft_clip
        self.supports_guidance = index == config.num_blocks - 1
        self.text_length = config.text_tokens if self.supports_guidance else 0
        self.prefix_length = self.text_length + 1
        self.proj_in = nn.Linear(config.token_dim, width)
        self.sos_embed = nn.Parameter(torch.randn(1, 1, config.token_dim, device=None))
        self.attn_blocks = nn.ModuleList(  # type: ignore[assignment]
            TransformerLayer(width, config.head_dim, config.expansion) for _ in range(layers)
        )
        self.final_norm = _RMSNorm(width)
        self.proj_out = nn.Linear(width, 2 * config.token_dim)
        nn.init.zeros_(self.proj_out.weight)
        if self.supports_guidance:
            self.proj_txt = nn.Linear(config.text_dim, width)
            self.register_buffer("null_text", torch.zeros(config.text_tokens, config.text_dim, device=None))

    def shared_parameters(self) -> SharedParameters:
        """Returns the rotations of the prefix and of the tokens. Token t uses the rotary position of t + 1."""
        side, weight = math.isqrt(self.num_tokens), self.proj_in.weight
        token = torch.arange(self.num_tokens, dtype=torch.float64, device="cpu")
        rows, columns = (F.pad(axis, (self.text_length, 1)) for axis in ((token / side).floor(), token % side))
        text = torch.arange(self.text_length, dtype=torch.float64, device="cpu") * side / max(self.text_length, 1)
        texts = F.pad(text, (0, self.num_tokens + 1))
        pairs = self.head_dim // 4 - _TEXT_PAIRS // 2
        angles = torch.cat((_angles(rows, pairs), _angles(columns, pairs), _angles(texts, _TEXT_PAIRS)), dim=1)
        return SharedParameters(Rotation(angles.cos().to(weight), angles.sin().to(weight)))

    def positions(self) -> Float[Tensor, "t w"]:
        assert self.proj_in.bias is not None
        return self.proj_in.bias.expand(self.num_tokens, -1)

    def embed_context(self, values: Tensor | None) -> None:
        return None

    def embed_prefix(self, values: Tensor | None, num: int) -> Float[Tensor, "b p w"]:
        start = self.proj_in(self.sos_embed).expand(num, -1, -1)
        if not self.supports_guidance:
            return start
        text = self.null_text if values is None else values
        projected = self.proj_txt(text.to(self.proj_in.weight.dtype)).expand(num, -1, -1)
        return torch.cat((projected, start.to(projected.dtype)), dim=1)

    def unconditional(self, values: Tensor) -> Tensor:
        return self.null_text.to(values).expand_as(values)

    def final_norm_weight(self) -> Float[Tensor, " w"]:
        return 1 + self.final_norm.weight

    def read_out(self, h: Float[Tensor, "b n w"], projections: Projections, dtype: torch.dtype) -> ScaleShift:
        normalised = F.rms_norm(h, h.shape[-1:], projections.final_norm, _NORM_EPSILON)
        out = F.linear(normalised, *projections.proj_out).to(dtype)
        scale, shift = (self.soft_clip * torch.tanh(out / self.soft_clip)).chunk(2, dim=-1)
        return F.softplus(scale + _INVERSE_SOFTPLUS_OF_1).log(), shift

    def output_weights(self) -> None:
        """Returns `None`: log-scales and shifts are not linear in the last layer."""


def _angles(positions: Float[Tensor, " t"], num: int) -> Float[Tensor, "t {num}"]:
    """Returns the angles of `num` pairs of channels at each position, in radians."""
    return positions.unsqueeze(-1) * _ROTARY_BASE ** -(torch.arange(num, dtype=torch.float64, device="cpu") / num)


@register_flow
class STARFlow(Flow):
    """A flow of images with a text: shallow blocks, and a deep one that reads the text and is sampled first.

    Its context is prompts, if it has a text encoder, or the states of texts (N, L, K) with L up to `text_tokens`,
    padded with zeros. `None` is the empty text, whose states are in the weights.

    Attributes:
        encode_text: Returns the states of a list of prompts, see `jacobiflow.models.t5_encoder`; by default that of
            the config.

    Reference: Gu et al., STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis, arXiv
    2506.06276.

    Example:
        >>> config = jf.STARFlowConfig(3, 8, 2, 64, (1, 2), text_tokens=4, text_dim=16)
        >>> flow = jf.STARFlow(config)
        >>> samples = jf.sample(flow, 2, context=torch.randn(2, 3, 16))
        >>> samples.images.shape
        torch.Size([2, 3, 8, 8])
    """

    model_type = "starflow"
    config_types = (STARFlowConfig,)
    block_type = STARFlowBlock
    config: STARFlowConfig
    blocks: Sequence[STARFlowBlock]
    encode_text: EncodeText | None

    def __init__(self, config: STARFlowConfig) -> None:
        super().__init__(config)
        self.encode_text = None
        if config.captions:
            self.encode_text = partial(
                word_encoder, captions=config.captions, text_tokens=config.text_tokens, text_dim=config.text_dim
            )
        elif config.text_encoder:
            self.encode_text = t5_encoder(config.text_encoder, config.text_tokens)

    @property
    def context_kind(self) -> Texts:
        return Texts(self.blocks[-1].null_text, self.encode_text)

    def make_block(self, index: int) -> STARFlowBlock:
        return STARFlowBlock(self.config, Permutation(self.config.of_block(index).order), index)

    @classmethod
    def from_original(
        cls, path: str | Path, config: STARFlowConfig | None = None, encode_text: EncodeText | None = None
    ) -> Self:
        """Loads a `.pth` state dict of the STARFlow code, in eval mode; float16 and bfloat16 become float32.

        By default the config is read from the shapes in the file, see `infer_config`. The states of the empty text,
        which guidance needs, are not in the file: `encode_text([""])` gives them, by default by the text encoder of
        the config.
        """
        state = read_original(path)
        config = cls.infer_config(state, str(path)) if config is None else config
        cls.check_config(config)
        state = {name: tensor for name, tensor in state.items() if name.partition(".")[0] not in _UNUSED_MODULES}
        null_text = torch.zeros(config.text_tokens, config.text_dim, device="cpu")
        state[f"blocks.{config.num_blocks - 1}.null_text"] = null_text
        flow = build(cls, config, state, str(path))
        if encode_text is not None:
            flow.encode_text = encode_text
        flow.recommended = SamplingSettings(denoise=1.0)
        if flow.encode_text is not None:
            texts = flow.context_kind
            texts.null_text.copy_(texts.pad("encode_text", texts.encode([""]))[0])
            # These are the settings of the script of the released weights.
            flow.recommended = SamplingSettings(Guidance(3.6, annealed=False, rule="density"), denoise=1.0)
        return flow

    @staticmethod
    def infer_config(state: Mapping[str, Tensor], source: str, patch_size: int = 1) -> STARFlowConfig:
        """Reads the config from shapes, and takes from the released weights what shapes do not tell.

        A CheckpointError begins with `source`.
        """
        shapes = OriginalShapes(state, source, "STARFlow")
        num_tokens, token_dim = shapes.shape("var", 2)
        sizes = shapes.transformer_sizes()
        _, text_dim = shapes.shape(f"blocks.{len(sizes.layers) - 1}.proj_txt.weight", 2)
        if patch_size < 1 or token_dim % patch_size**2:
            raise CheckpointError(f"{source}: a patch size of {patch_size}: its square must divide {token_dim} values")
        rotary = "feat_rope.freqs_cos"  # It has a row for each text token and each image token.
        text_tokens = shapes.shape(rotary, 2)[0] - num_tokens if rotary in state else STARFlowConfig.text_tokens
        return STARFlowConfig(
            in_channels=token_dim // patch_size**2,
            image_size=math.isqrt(num_tokens) * patch_size,
            patch_size=patch_size,
            width=sizes.width,
            layers_per_block=sizes.layers,
            text_tokens=text_tokens,
            text_dim=text_dim,
            expansion=sizes.expansion,
        )

    def to_tokens(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n t c"]:
        size = self.config.patch_size
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (N, C, rows, size, columns, size)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def from_tokens(self, tokens: Float[Tensor, "n t c"]) -> Float[Tensor, "n ..."]:
        size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        patches = tokens.unflatten(2, (size, size, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
