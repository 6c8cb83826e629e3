"""MAF (arXiv 1705.07057): an autoregressive normalizing flow of masked dense networks over the pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

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
from jacobiflow.errors import InputValueError
from jacobiflow.models.config import MAFConfig, embed_classes
from jacobiflow.models.flow import Flow, Images, register_flow
from jacobiflow.native import usable_library
from jacobiflow.native.boundary import Activation, Operation, OperationKind, TransformKind, UnsupportedError
from jacobiflow.native.chain import TransformChain
from jacobiflow.native.masked import MaskedOperation, Steps, masked_transform

_CONSTANT = 1e-3  # an entry whose standard deviation over the first batch is below it keeps its scale


class MaskedLayer(NamedTuple):
    """A layer h -> h weight^T + offset: its weight times the mask, and its bias plus the classes' part."""

    weight: Float[Tensor, "o i"]
    offset: Float[Tensor, "#b o"]


class MaskedLinear(nn.Module):
    """A dense layer in which an output of degree d sees the inputs of degree d and below, with a bias per class."""

    def __init__(self, in_degrees: np.ndarray, out_degrees: np.ndarray, num_classes: int) -> None:
        super().__init__()
        self.in_degrees, self.out_degrees = in_degrees, out_degrees
        dense = nn.Linear(len(in_degrees), len(out_degrees))
        self.weight, self.bias = dense.weight, dense.bias
        self.class_embed = nn.Parameter(torch.zeros(num_classes, len(out_degrees))) if num_classes else None

    def offset(self, labels: Int[Tensor, " b"] | None) -> Float[Tensor, "#b o"]:
        """Returns the bias plus the class's part."""
        classes = embed_classes(self.class_embed, labels)
        return self.bias.unsqueeze(0) if classes is None else self.bias + classes

    def masked_weight(self) -> Float[Tensor, "o i"]:
        """Returns the weight times the mask."""
        return self.masked(self.weight)

    def masked(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Returns a weight times the mask."""
        inputs, outputs = (torch.from_numpy(d).to(weight.device) for d in (self.in_degrees, self.out_degrees))
        return weight.masked_fill(outputs.unsqueeze(1) < inputs, 0)


@dataclass(frozen=True)
class MAFCache:
    """Tokens and hidden units of a block while it is solved, and its layers with a row of offsets per sample.

    Units are sorted by degree, so that those which a run of tokens adds are a slice of each layer.
    """

    tokens: Float[Tensor, "b t"]
    hidden: tuple[Float[Tensor, "b h"], ...]
    layers: tuple[MaskedLayer, ...]


class MAFBlock(FlowBlock):
    """One masked affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    `s` (log-scale) and `u` (shift) come from a masked dense network (MADE) with sorted degrees. Token i has degree i,
    unit k of H in a hidden layer has degree floor(k (T-1) / H), and a unit sees tokens, and units of the layer before,
    up to its own degree. Entry t reads units of degrees below t, in rows 2t (`s`) and 2t + 1 (`u`) of the last layer;
    entry 0 has biases only. So a run of tokens needs only the units of lower degree, computed before: a MADE has a
    cache, as attention has, and T tokens one by one cost about one pass.

    References: MAF, arXiv 1705.07057; MADE, arXiv 1502.03509.
    """

    inference_safe = has_inverse_gradients = True
    layers: Sequence[MaskedLinear]

    def __init__(self, config: MAFConfig, permutation: Permutation) -> None:
        super().__init__()
        self.num_tokens, self.hidden_features = config.num_tokens, config.hidden_features
        self.permutation = permutation
        tokens = np.arange(self.num_tokens)
        units = np.arange(self.hidden_features) * (self.num_tokens - 1) // self.hidden_features
        entries = (tokens - 1).repeat(2)  # entry t reads what a unit of token t - 1 may
        degrees = [tokens, *[units] * config.hidden_layers, entries]
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            MaskedLinear(seen, by, config.num_classes) for seen, by in pairwise(degrees)
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def masked_layers(self, labels: Int[Tensor, " b"] | None = None) -> tuple[MaskedLayer, ...]:
        """Returns the masked layers, first to last, for rows of these labels."""
        return tuple(MaskedLayer(layer.masked_weight(), layer.offset(labels)) for layer in self.layers)

    def affine_whole(self, x: Tokens, context: Context = NO_CONTEXT) -> ScaleShift:
        return full_pass(x, self.masked_layers(context.values))

    def init_cache(self, z: Tokens, context: Context = NO_CONTEXT) -> MAFCache:
        check_input(z, self.num_tokens, 1)
        # A row of offsets per sample, or every step would expand the one.
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
        new = slice(*(_units_below(degree, self.num_tokens, self.hidden_features) for degree in (first, last)))
        inputs = cache.tokens[:, :last]
        *inner, final = cache.layers
        for layer, hidden in zip(inner, cache.hidden, strict=True):
            hidden[:, new] = F.relu(_rows(layer, new, inputs))
            inputs = hidden[:, : new.stop]
        out = _rows(final, slice(2 * start, 2 * stop), inputs)
        return _read_out(out, x.dtype)

    def row_bytes(self) -> int:
        # Tokens, hidden units, offsets of all layers, and the outputs.
        values = 2 * (len(self.layers) - 1) * self.hidden_features + 6 * self.num_tokens
        return values * self.layers[0].weight.element_size()

    def encode(self, x: Tokens, context: Context = NO_CONTEXT) -> TokensLogDet:
        result = self._evaluate(x, context, None, is_inverse=False)
        return super().encode(x, context) if result is None else (result[0], -result[1])

    def sequential_inverse(
        self, z: Tokens, context: Context = NO_CONTEXT, guidance: Guidance | None = None, int16_weights: bool = False
    ) -> TokensLogDet | None:
        return None if int16_weights else self._evaluate(z, context, guidance, is_inverse=True)

    def _evaluate(
        self, tokens: Tokens, context: Context, guidance: Guidance | None, is_inverse: bool
    ) -> TokensLogDet | None:
        """The block or its inverse in native code, and log|det|; `None` if these are left to PyTorch."""
        if usable_library(tokens) is None or tokens.shape[2:] != (1,):
            return None
        tensors = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        tables = [layer.class_embed for layer in self.layers if layer.class_embed is not None]
        tensors += [table.t() for table in tables]
        classes = embed_classes(torch.eye(len(tables[0]), dtype=tokens.dtype), context.values) if tables else None
        if guidance is not None:
            tensors += [layer.offset(None).squeeze(0) for layer in self.layers]
            tensors.append(torch.stack(guidance.weights(tokens), dim=1))
        shapes = tuple(tensor.shape for tensor in tensors)
        try:
            chain = _chain(shapes, len(self.layers), bool(tables), guidance is not None)
        except UnsupportedError:
            return None
        tensors = [tensor.contiguous() for tensor in tensors]
        in_pytorch = None if is_inverse else self._encode_in_pytorch
        result = chain.evaluate(tensors, tokens.squeeze(-1), classes, is_inverse, "rows", in_pytorch)
        return None if result is None or result.log_det is None else (result.values.unsqueeze(-1), result.log_det)

    def _encode_in_pytorch(
        self, x: Float[Tensor, "b t"], classes: Float[Tensor, "#b n"] | None, tensors: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, " b"]]:
        """The latents of tokens and log|det|, from the tensors that native code reads, for second derivatives."""
        layers = []
        for i, layer in enumerate(self.layers):
            offset = tensors[2 * i + 1].unsqueeze(0)
            if classes is not None:
                offset = offset + F.linear(classes, tensors[2 * len(self.layers) + i])
            layers.append(MaskedLayer(layer.masked(tensors[2 * i]), offset))
        log_scale, shift = (part.squeeze(-1) for part in full_pass(x.unsqueeze(-1), layers))
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(dim=1)

    def output_weights(self) -> tuple[Float[Tensor, "t h"], Float[Tensor, "t h"]]:
        weight = self.layers[-1].masked_weight().detach()
        return weight[0::2], weight[1::2]

    @torch.no_grad()
    def normalize_outputs(self, x: Tokens, labels: Int[Tensor, " b"] | None) -> None:
        """Sets the output biases so that every entry of z has mean 0 and standard deviation 1 over the rows of `x`.

        This is activation normalisation (Glow, arXiv 1807.03039). An entry that hardly varies keeps its scale.
        """
        log_scale, shift = self(x, labels)
        inverse = torch.exp(-log_scale)
        moved = (inverse * (x - shift)).mean(dim=0) / inverse.mean(dim=0)
        spread = (inverse * (x - shift - moved)).std(dim=0, correction=0)
        grown = torch.where(spread > _CONSTANT, spread, 1).log()
        self.layers[-1].bias.add_(torch.stack((grown, moved), dim=1).flatten())


def full_pass(x: Tokens, layers: Sequence[MaskedLayer]) -> ScaleShift:
    """Log-scale and shift of every entry, by the whole network."""
    h = x.squeeze(-1).to(layers[0].weight.dtype)
    for layer in layers[:-1]:
        h = F.relu(F.linear(h, layer.weight) + layer.offset)
    return _read_out(F.linear(h, layers[-1].weight) + layers[-1].offset, x.dtype)


def _units_below(degree: int, tokens: int, units: int) -> int:
    """The number of units of a hidden layer with a degree below `degree`; they are its first ones."""
    return -(-degree * units // max(tokens - 1, 1))


def _rows(layer: MaskedLayer, rows: slice, inputs: Float[Tensor, "b i"]) -> Float[Tensor, "b n"]:
    """Outputs `rows` of a layer from its first `inputs`; the mask hides all others from them."""
    return torch.addmm(layer.offset[:, rows], inputs, layer.weight[rows, : inputs.shape[1]].T)


def _read_out(out: Float[Tensor, "b n2"], dtype: torch.dtype) -> ScaleShift:
    log_scale, shift = out.to(dtype).unflatten(1, (-1, 2)).chunk(2, dim=-1)
    return log_scale, shift


@lru_cache(maxsize=32)
def _chain(shapes: tuple[torch.Size, ...], layers: int, has_classes: bool, is_guided: bool) -> TransformChain:
    """Describes the block to native code.

    The order of tensors, which have these `shapes`: weight and bias of each layer, the classes' embeddings, the second
    network's biases, the guidance weights.
    """
    units, tokens = shapes[0]
    hidden = (list(range(units)), [_units_below(token, tokens, units) for token in range(tokens)])
    second = (3 if has_classes else 2) * layers
    outputs = (list(range(2 * tokens)), [2 * token + 2 for token in range(tokens)])
    operations: list[MaskedOperation] = []

    def add(kind: OperationKind, order: Any, source: int, **fields: Any) -> int:
        operation = Operation(kind=kind, source=source, **{"weight": -1, "bias": -1, **fields})
        operations.append(MaskedOperation(operation, order))
        return len(operations)

    def network(is_second: bool) -> int:
        value = 0
        for layer in range(layers):
            is_hidden, has_context = layer + 1 < layers, has_classes and not is_second
            order, bias = (hidden if is_hidden else outputs), (second + layer if is_second else 2 * layer + 1)
            last = {"activation": Activation.RELU, "is_kept": True} if is_hidden else {}
            value = add(
                OperationKind.LINEAR, order, value, weight=2 * layer, bias=bias, **({} if has_context else last)
            )
            if has_context:
                value = add(OperationKind.ADD_CONTEXT, order, value, weight=2 * layers + layer)
                value = add(OperationKind.ACTIVATION, order, value, **last) if is_hidden else value
        return value

    value = network(is_second=False)
    if is_guided:
        other = network(is_second=True)
        add(OperationKind.EXTRAPOLATION, outputs, value, other=other, bias=second + layers)
    order, kind = list(range(tokens)), TransformKind.LOG_AFFINE
    classes = shapes[2 * layers][1] if has_classes else 0
    transform = masked_transform(
        Steps(order, [*order, tokens], (order, order)), operations, shapes, parameters=2, own_context=classes, kind=kind
    )
    return TransformChain([(transform, False)])


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
        """Makes a config; `channels` and `layers` are of the hidden layers."""
        return MAFConfig(in_channels, image_size, channels, blocks, layers, num_classes)

    def to_tokens(self, images: Images) -> Tokens:
        """Returns y = logit(alpha + (1 - 2 alpha) p) of pixels p = (image + 1) / 2.

        A pixel outside [-1, 1] by more than alpha has no logit, and raises ValueError.
        """
        pixels, alpha = images.flatten(1).unsqueeze(-1), self.config.logit_alpha
        # Both from the image itself: 1 - p would lose the digits of a p near 1.
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
        def normalized(i: int, x: Tensor) -> ScaleShift:
            self.blocks[i].normalize_outputs(x, labels)
            return self.blocks[i](x, labels)

        for _ in self.encode_steps(self.to_tokens(images), parameters=normalized):
            pass
