"""MAF (arXiv 1705.07057): an autoregressive normalizing flow of masked dense networks over the pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.base import FlowBlock, ScaleShift, TokensLogDet, check_context_rows, check_input
from jacobiflow.blocks.context import NO_CONTEXT, Context, GuidedRows
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens, row_batches
from jacobiflow.errors import InputValueError, UnsupportedError
from jacobiflow.models.config import check_sizes
from jacobiflow.models.contexts import embed_classes
from jacobiflow.models.flow import Flow, Images
from jacobiflow.models.registry import register_flow
from jacobiflow.native import usable_library
from jacobiflow.native.boundary import Activation, ScaleActivation, TransformKind
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.masked_network import MaskedNetwork
from jacobiflow.native.transforms import masked_transform
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
    token_dim: ClassVar[int] = 1
    noise_std: ClassVar[float] = 0.0  # Images are uniformly dequantised.

    def __post_init__(self) -> None:
        check_sizes(self)
        check_number("logit_alpha", self.logit_alpha, math.ulp(0.0), "a small positive number, below 0.5", 0.5)
        check_fields(self)

    @property
    def num_tokens(self) -> int:
        """T, the number of pixels, in all channels."""
        return self.in_channels * self.image_size**2


class MaskedLayer(NamedTuple):
    """A layer h -> h weight^T + offset, of a masked weight, and a bias plus the classes' part."""

    weight: Float[Tensor, "o i"]
    offset: Float[Tensor, "#b o"]


class MaskedLinear(nn.Module):
    """A dense layer in which an output of degree d sees the inputs of degree d and below, with a bias per class."""

    def __init__(self, in_degrees: np.ndarray, out_degrees: np.ndarray, num_classes: int) -> None:
        super().__init__()
        self.in_degrees, self.out_degrees = in_degrees, out_degrees
        dense = nn.Linear(len(in_degrees), len(out_degrees))
        self.weight, self.bias = dense.weight, dense.bias
        embeddings = torch.zeros(num_classes, len(out_degrees), device=None)
        self.class_embed = nn.Parameter(embeddings) if num_classes else None

    def offset(self, labels: Int[Tensor, " b"] | None) -> Float[Tensor, "#b o"]:
        """Returns the bias plus the part of each row's class."""
        classes = embed_classes(self.class_embed, labels)
        return self.bias.unsqueeze(0) if classes is None else self.bias + classes

    def apply_mask(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Returns a weight times the mask."""
        inputs, outputs = (torch.from_numpy(d).to(weight.device) for d in (self.in_degrees, self.out_degrees))
        return weight.masked_fill(outputs.unsqueeze(1) < inputs, 0)


def run_masked_layers(x: Tokens, layers: Sequence[MaskedLayer]) -> ScaleShift:
    """Returns log-scale and shift of every entry."""
    h = x.squeeze(-1).to(layers[0].weight.dtype)
    for layer in layers[:-1]:
        h = F.relu(F.linear(h, layer.weight) + layer.offset)
    return _split_outputs(F.linear(h, layers[-1].weight) + layers[-1].offset, x.dtype)


def _run_rows(layer: MaskedLayer, rows: slice, inputs: Float[Tensor, "b i"]) -> Float[Tensor, "b n"]:
    """Returns outputs `rows` of a layer from its first `inputs`; the mask hides all other inputs from them."""
    return torch.addmm(layer.offset[:, rows], inputs, layer.weight[rows, : inputs.shape[1]].T)


def _split_outputs(out: Float[Tensor, "b n2"], dtype: torch.dtype) -> ScaleShift:
    """Returns log-scale and shift, which are alternate outputs of the last layer."""
    log_scale, shift = out.to(dtype).unflatten(1, (-1, 2)).chunk(2, dim=-1)
    return log_scale, shift


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

    is_pure = True
    layers: Sequence[MaskedLinear]

    def __init__(self, config: MAFConfig, permutation: Permutation) -> None:
        super().__init__()
        self.config, self.permutation = config, permutation
        self.num_tokens, self.hidden_features = config.num_tokens, config.hidden_features
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            MaskedLinear(seen, by, config.num_classes) for seen, by in _layer_degrees(config)
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
        new = slice(*map(self._count_units_below, (first, last)))
        inputs = cache.tokens[:, :last]
        *inner, final = cache.layers
        for layer, hidden in zip(inner, cache.hidden, strict=True):
            hidden[:, new] = F.relu(_run_rows(layer, new, inputs))
            inputs = hidden[:, : new.stop]
        out = _run_rows(final, slice(2 * start, 2 * stop), inputs)
        return _split_outputs(out, x.dtype)

    def _count_units_below(self, degree: int) -> int:
        """Returns the number of units of a hidden layer with a degree below `degree`; they are its first ones."""
        return -(-degree * self.hidden_features // max(self.num_tokens - 1, 1))

    def row_bytes(self) -> int:
        # These are tokens, hidden units, offsets of all layers, and the outputs.
        values = 2 * (len(self.layers) - 1) * self.hidden_features + 6 * self.num_tokens
        return values * self.layers[0].weight.element_size()

    def encode(self, x: Tokens, context: Context = NO_CONTEXT) -> TokensLogDet:
        try:
            return self._evaluate(x, context, (), is_inverse=False)
        except UnsupportedError:
            return super().encode(x, context)

    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, batch_size: int | None = None
    ) -> TokensLogDet:
        return self._invert(z, context, (), batch_size)

    def guided_inverse(self, z: Tokens, rows: GuidedRows, batch_size: int | None = None) -> TokensLogDet:
        labels = rows.unconditional.values
        distinct = set() if labels is None else set(labels.tolist())
        if rows.rule != "linear" or len(distinct) > 1:
            raise UnsupportedError("guidance of a MAF by the rule density, or by unconditional rows that differ")
        label = None if labels is None or max(distinct, default=-1) < 0 else labels[:1]  # Below 0 it is no class.
        tensors = [each for layer in self.layers for each in (layer.weight, layer.offset(label).squeeze(0))]
        return self._invert(z, rows.conditional, [*tensors, torch.stack(rows.weights, dim=1).flatten()], batch_size)

    def _invert(self, z: Tokens, context: Context, guidance: Sequence[Tensor], batch_size: int | None) -> TokensLogDet:
        if batch_size is None or len(z) <= batch_size:
            return self._evaluate(z, context, guidance, is_inverse=True)
        check_context_rows(context, len(z))
        batches = row_batches(len(z), batch_size)
        answers = [self._evaluate(z[rows], context[rows], guidance, is_inverse=True) for rows in batches]
        x, log_det = map(torch.cat, zip(*answers, strict=True))
        return x, log_det

    def _evaluate(self, tokens: Tokens, context: Context, guidance: Sequence[Tensor], is_inverse: bool) -> TokensLogDet:
        """Returns the result of the block or its inverse by native code, and log|det|, or raises UnsupportedError.

        Under guidance there are the weight and the bias of each layer for the unconditional row, and the weights w.
        """
        usable_library(tokens)  # Raises UnsupportedError if there is none.
        if tokens.shape[2:] != (1,):
            raise UnsupportedError(f"tokens {tuple(tokens.shape)} with other than one channel")
        num_classes = self.config.num_classes
        table = torch.eye(num_classes, dtype=tokens.dtype, device=tokens.device) if num_classes else None
        classes = embed_classes(table, context.values)
        in_pytorch = None if is_inverse else self._encode_in_pytorch
        chain, tensors = _describe_block(self.config, len(guidance) > 0), [*self._native_tensors(), *guidance]
        result = chain.evaluate(tensors, tokens.squeeze(-1), classes, is_inverse, "rows", in_pytorch)
        assert result.log_det is not None
        return result.values.unsqueeze(-1), result.log_det

    def _native_tensors(self) -> list[Tensor]:
        """Returns the weight, the bias and the embeddings of classes of each layer, as `_describe_block` adds them."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            tensors += [layer.weight, layer.bias]
            if layer.class_embed is not None:
                tensors.append(layer.class_embed.t())
        return [tensor.contiguous() for tensor in tensors]

    def _encode_in_pytorch(
        self, x: Float[Tensor, "b t"], classes: Float[Tensor, "#b n"] | None, tensors: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, " b"]]:
        """Returns latents and log|det|, from the tensors that native code reads, for second derivatives."""
        layers, each = [], iter(tensors)
        for layer in self.layers:
            weight, offset = layer.apply_mask(next(each)), next(each).unsqueeze(0)
            layers.append(MaskedLayer(weight, offset if classes is None else offset + F.linear(classes, next(each))))
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


def _layer_degrees(config: MAFConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the degrees of the inputs and of the outputs of each layer."""
    tokens = np.arange(config.num_tokens)
    units = np.arange(config.hidden_features) * (config.num_tokens - 1) // config.hidden_features
    entries = (tokens - 1).repeat(2)  # Entry t sees what a unit of degree t - 1 sees.
    return list(pairwise([tokens, *[units] * config.hidden_layers, entries]))


@lru_cache(maxsize=32)
def _describe_block(config: MAFConfig, is_guided: bool) -> TransformChain:
    """Returns the chain of one transform that native code evaluates; `MAFBlock._evaluate` gives it its tensors."""
    network = MaskedNetwork(torch.arange(2 * config.num_tokens, device="cpu").view(-1, 2))
    value = _add_layers(network, config, config.num_classes)
    if is_guided:
        network.add_guidance(value, _add_layers(network, config, num_classes=0))
    scale = {"scale_activation": ScaleActivation.EXP, "parametrizes_inverse": True}  # x = exp(s) z + u
    return TransformChain([masked_transform(network, kind=TransformKind.MASKED_AFFINE, **scale)])


def _add_layers(network: MaskedNetwork, config: MAFConfig, num_classes: int) -> int:
    """Adds the layers of a block."""
    value, degrees = 0, _layer_degrees(config)
    for i, (seen, by) in enumerate(degrees):
        mask = torch.from_numpy(by[:, None] >= seen)
        activation = {"activation": Activation.RELU} if i + 1 < len(degrees) else {}
        if not num_classes:
            value = network.add_linear(value, len(mask), mask, **activation)
            continue
        value = network.add_context(network.add_linear(value, len(mask), mask), num_classes, has_bias=False)
        if activation:
            value = network.add_activation(value, **activation)
    return value


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
        cls, *, in_channels: int, image_size: int, num_classes: int, width: int, blocks: int, layers: int
    ) -> MAFConfig:
        """Makes a config; `width` is the width and `layers` the number of the hidden layers."""
        return MAFConfig(in_channels, image_size, width, blocks, layers, num_classes)

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
