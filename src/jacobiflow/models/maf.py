"""MAF (arXiv 1705.07057): an autoregressive normalizing flow of masked dense networks over the pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.base import FlowBlock, ScaleShift, TokensLogDet, check_input
from jacobiflow.blocks.context import NO_CONTEXT, Context
from jacobiflow.blocks.guidance import Guidance
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError, UnsupportedError
from jacobiflow.models.config import check_sizes
from jacobiflow.models.flow import Flow, Images
from jacobiflow.models.labels import embed_classes
from jacobiflow.models.maf_native import NativeLayout, describe_block
from jacobiflow.models.masked_network import (
    MaskedLayer,
    MaskedLinear,
    count_units_below,
    run_masked_layers,
    run_rows,
    split_outputs,
)
from jacobiflow.models.registry import register_flow
from jacobiflow.native import usable_library
from jacobiflow.utils.checks import check_fields, check_number

_MIN_STD = 1e-3
"""Activation normalisation leaves the scale of an entry with a smaller standard deviation over the first batch."""


@dataclass(frozen=True)
class MAFConfig:
    """Shape of a `MAF`.

    Args:
        image_size: Height and width of an image, in pixels.
        hidden_features: Units of a hidden layer, in the masked network of each block.
        num_classes: Number of classes; 0 for an unconditional flow.
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
    token_channels: ClassVar[int] = 1
    noise_std: ClassVar[float] = 0.0  # Images are uniformly dequantised.

    def __post_init__(self) -> None:
        check_sizes(self)
        check_number("logit_alpha", self.logit_alpha, math.ulp(0.0), "a small positive number, below 0.5", 0.5)
        check_fields(self)

    @property
    def num_tokens(self) -> int:
        """T, the number of pixels, in all channels."""
        return self.in_channels * self.image_size**2


@dataclass(frozen=True)
class MAFCache:
    """Tokens and hidden units of a block while it is solved, and its layers with a row of offsets per sample.

    Units are sorted by degree, so that a run of tokens adds a slice of units to each layer.
    """

    tokens: Float[Tensor, "b t"]
    hidden: tuple[Float[Tensor, "b h"], ...]
    layers: tuple[MaskedLayer, ...]


class MAFBlock(FlowBlock):
    """One masked affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    `s` (log-scale) and `u` (shift) come from a masked dense network (MADE) with sorted degrees. Token i has degree i.
    Unit k of H in a hidden layer has degree floor(k (T-1) / H). A unit sees tokens, and units of the layer before, up
    to its own degree. Rows 2t (`s`) and 2t + 1 (`u`) of the last layer, for entry t, see units of degrees below t;
    entry 0 has biases only.

    A run of tokens needs only the units of lower degrees, which the cache keeps. So T tokens one by one cost about one
    pass.

    References: MAF, arXiv 1705.07057; MADE, arXiv 1502.03509.
    """

    inference_safe = has_inverse_gradients = is_causal = True
    layers: Sequence[MaskedLinear]

    def __init__(self, config: MAFConfig, permutation: Permutation) -> None:
        super().__init__()
        self.num_tokens, self.hidden_features = config.num_tokens, config.hidden_features
        self.permutation = permutation
        tokens = np.arange(self.num_tokens)
        units = np.arange(self.hidden_features) * (self.num_tokens - 1) // self.hidden_features
        entries = (tokens - 1).repeat(2)  # Entry t sees what a unit of degree t - 1 sees.
        degrees = [tokens, *[units] * config.hidden_layers, entries]
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            MaskedLinear(seen, by, config.num_classes) for seen, by in pairwise(degrees)
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def masked_layers(self, labels: Int[Tensor, " b"] | None = None) -> tuple[MaskedLayer, ...]:
        """Returns the masked layers, first to last, for rows of these labels."""
        return tuple(MaskedLayer(layer.apply_mask(layer.weight), layer.offset(labels)) for layer in self.layers)

    def affine_whole(self, x: Tokens, context: Context = NO_CONTEXT) -> ScaleShift:
        return run_masked_layers(x, self.masked_layers(context.values))

    def init_cache(self, z: Tokens, context: Context = NO_CONTEXT) -> MAFCache:
        check_input(z, self.num_tokens, 1)
        # The offset is expanded here once, and not in every step.
        layers = tuple(
            MaskedLayer(layer.weight, layer.offset.expand(len(z), -1).contiguous())
            for layer in self.masked_layers(context.values)
        )
        weight = layers[0].weight
        return MAFCache(
            tokens=weight.new_zeros(len(z), self.num_tokens),
            hidden=tuple(weight.new_zeros(len(z), self.hidden_features) for _ in layers[:-1]),
            layers=layers,
        )

    def affine(self, x: Tokens, start: int, stop: int, cache: MAFCache) -> ScaleShift:
        first, last = max(start - 1, 0), stop - 1
        cache.tokens[:, first:last] = x[:, first:last, 0]
        new = slice(*(count_units_below(degree, self.num_tokens, self.hidden_features) for degree in (first, last)))
        inputs = cache.tokens[:, :last]
        *inner, final = cache.layers
        for layer, hidden in zip(inner, cache.hidden, strict=True):
            hidden[:, new] = F.relu(run_rows(layer, new, inputs))
            inputs = hidden[:, : new.stop]
        out = run_rows(final, slice(2 * start, 2 * stop), inputs)
        return split_outputs(out, x.dtype)

    def row_bytes(self) -> int:
        # These are tokens, hidden units, offsets of all layers, and the outputs.
        values = 2 * (len(self.layers) - 1) * self.hidden_features + 6 * self.num_tokens
        return values * self.layers[0].weight.element_size()

    def encode(self, x: Tokens, context: Context = NO_CONTEXT) -> TokensLogDet:
        try:
            z, log_det = self._evaluate(x, context, None, is_inverse=False)
        except UnsupportedError:
            return super().encode(x, context)
        return z, -log_det

    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, guidance: Guidance | None = None
    ) -> TokensLogDet:
        return self._evaluate(z, context, guidance, is_inverse=True)

    def _evaluate(self, tokens: Tokens, context: Context, guidance: Guidance | None, is_inverse: bool) -> TokensLogDet:
        """Returns the result of the block or its inverse by native code, and log|det|, or raises UnsupportedError."""
        usable_library(tokens)
        if tokens.shape[2:] != (1,):
            raise UnsupportedError(f"tokens {tuple(tokens.shape)} with other than one channel")
        tensors = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        tables = [layer.class_embed for layer in self.layers if layer.class_embed is not None]
        tensors += [table.t() for table in tables]
        classes = embed_classes(torch.eye(len(tables[0]), dtype=tokens.dtype), context.values) if tables else None
        if guidance is not None:
            tensors += [layer.offset(None).squeeze(0) for layer in self.layers]
            tensors.append(torch.stack(guidance.weights(tokens), dim=1))
        shapes = tuple(tensor.shape for tensor in tensors)
        chain = describe_block(NativeLayout(shapes, len(self.layers), bool(tables), guidance is not None))
        tensors = [tensor.contiguous() for tensor in tensors]
        in_pytorch = None if is_inverse else self._encode_in_pytorch
        result = chain.evaluate(tensors, tokens.squeeze(-1), classes, is_inverse, "rows", in_pytorch)
        assert result.log_det is not None
        return result.values.unsqueeze(-1), result.log_det

    def _encode_in_pytorch(
        self, x: Float[Tensor, "b t"], classes: Float[Tensor, "#b n"] | None, tensors: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, " b"]]:
        """Returns latents and log|det|, from the tensors that native code reads, for second derivatives."""
        layers = []
        for i, layer in enumerate(self.layers):
            offset = tensors[2 * i + 1].unsqueeze(0)
            if classes is not None:
                offset = offset + F.linear(classes, tensors[2 * len(self.layers) + i])
            layers.append(MaskedLayer(layer.apply_mask(tensors[2 * i]), offset))
        log_scale, shift = (part.squeeze(-1) for part in run_masked_layers(x.unsqueeze(-1), layers))
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1)

    def output_weights(self) -> tuple[Float[Tensor, "t h"], Float[Tensor, "t h"]]:
        weight = self.layers[-1].apply_mask(self.layers[-1].weight).detach()
        return weight[0::2], weight[1::2]

    @torch.no_grad()
    def normalize_outputs(self, x: Tokens, context: Context) -> None:
        """Sets the output biases so that every entry of z has mean 0 and standard deviation 1 over the rows of `x`.

        This is activation normalisation (Glow, arXiv 1807.03039). An entry that hardly varies keeps its scale.
        """
        log_scale, shift = self(x, context)
        inverse = torch.exp(-log_scale)
        added_shift = (inverse * (x - shift)).mean(dim=0) / inverse.mean(dim=0)
        std = (inverse * (x - shift - added_shift)).std(dim=0, correction=0)
        added_log_scale = torch.where(std > _MIN_STD, std, 1).log()
        self.layers[-1].bias.add_(torch.stack((added_log_scale, added_shift), dim=1).flatten())


@register_flow
class MAF(Flow):
    """Stack of masked affine blocks over the logits of an image's pixels, alternately in raster and in reverse order.

    Images are uniformly dequantised, in [-1, 1].

    Reference: Papamakarios et al., Masked Autoregressive Flow for Density Estimation, arXiv 1705.07057.

    Example:
        >>> flow = jf.load("digits-maf")
        >>> flow.log_prob(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    model_type = "maf"
    config_types = (MAFConfig,)
    block_type = MAFBlock
    config: MAFConfig
    blocks: Sequence[MAFBlock]

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int
    ) -> MAFConfig:
        """Makes a config; `channels` is the width and `layers` the number of the hidden layers."""
        return MAFConfig(in_channels, image_size, channels, blocks, layers, num_classes)

    def to_tokens(self, images: Images) -> Tokens:
        """Returns y = logit(alpha + (1 - 2 alpha) p) of pixels p = (image + 1) / 2.

        A pixel outside [-1, 1] by more than alpha has no logit, and raises ValueError.
        """
        pixels, alpha = images.flatten(1).unsqueeze(-1), self.config.logit_alpha
        # Both logarithms are of the image itself, since 1 - p would lose the digits of a p near 1.
        log_p, log_rest = (torch.log(alpha + (0.5 - alpha) * (1 + sign * pixels)) for sign in (1, -1))
        finite = torch.isfinite(log_p) & torch.isfinite(log_rest)
        if not finite.all():
            raise InputValueError(f"image value {float(pixels[~finite][0]):.7g}: a MAF takes images in [-1, 1]")
        return log_p - log_rest

    def tokens_log_det(self, tokens: Float[Tensor, "n t 1"]) -> Float[Tensor, " n"]:
        log_slopes = math.log(0.5 - self.config.logit_alpha) - F.logsigmoid(tokens) - F.logsigmoid(-tokens)
        return log_slopes.sum(dim=(1, 2))

    def from_tokens(self, x: Tokens) -> Images:
        config = self.config
        images = torch.tanh(x / 2) / (1 - 2 * config.logit_alpha)
        return images.reshape(-1, config.in_channels, config.image_size, config.image_size)

    @torch.no_grad()
    def initialize(self, images: Images, labels: Int[Tensor, " n"] | None = None) -> None:
        x, context = self.to_tokens(images), Context(labels)
        for block in self.blocks:
            x = block.permutation(x)
            block.normalize_outputs(x, context)
            x = block.permutation.inverse(block.encode(x, context)[0])
