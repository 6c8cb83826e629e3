"""MAF (arXiv 1705.07057): an autoregressive normalizing flow of masked dense networks over the pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import ExactInverse, Extrapolation, FlowBlock, KeepsNothing, check_input
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.maf.config import MAFConfig
from jacobiflow.flows.maf.masked import MaskedLayer, MaskedLinear
from jacobiflow.flows.maf.recurrence import solve_rows
from jacobiflow.flows.permutation import Permutation
from jacobiflow.flows.registry import register
from jacobiflow.flows.weights import count_layers
from jacobiflow.native import usable

_CONSTANT = 1e-3  # an entry whose standard deviation over the first batch is below it keeps its scale


@dataclass(frozen=True)
class MAFCache:
    """What a block keeps while its tokens are solved: the tokens that were fed, and what the units made of them.

    Units are in the order of their degrees, so that those which a run of tokens adds to are a slice of each layer.
    The network runs in the dtype of all these.
    """

    tokens: Float[Tensor, "b t"]
    hidden: tuple[Float[Tensor, "b h"], ...]
    layers: tuple[MaskedLayer, ...]


class MAFBlock(FlowBlock, ExactInverse, KeepsNothing):
    """One masked affine block: z_t = exp(-s(x_<t)) (x_t - u(x_<t)), eq. (1) of the GS-Jacobi paper.

    `s` (log-scale) and `u` (shift) come from a masked dense network (MADE) with sorted degrees. Token i has degree i,
    unit k of H in a hidden layer has degree floor(k (T-1) / H), and a unit sees tokens, and units of the layer before,
    up to its own degree. Entry t reads units of degrees below t, in rows 2t (`s`) and 2t + 1 (`u`) of the last layer;
    entry 0 has biases only. So tokens a .. b - 1 can be fed alone, given what those before made of the units of lower
    degree: a MADE has a cache, as attention has, and T tokens one by one cost about one pass.

    References: Papamakarios et al., Masked Autoregressive Flow for Density Estimation, arXiv 1705.07057; Germain et
    al., MADE, arXiv 1502.03509.
    """

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
        """The masked layers, first to last, for rows of these labels."""
        return tuple(layer.masked(labels) for layer in self.layers)

    def affine_whole(
        self,
        x: Float[Tensor, "b t 1"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b t 1"], Float[Tensor, "b t 1"]]:
        """By the whole network; see `AffineBlock.affine_whole`."""
        _check_temperature(attn_temperature)
        return full_pass(x, self.masked_layers(context))

    def init_cache(
        self,
        z: Float[Tensor, "b t 1"],
        context: Int[Tensor, " b"] | None = None,
        attn_temperature: Float[Tensor, " b"] | None = None,
    ) -> MAFCache:
        """An empty cache for the rows of `z` under labels `context`.

        **Raises** `ValueError` where `attn_temperature` is given: there is no attention here.
        """
        _check_temperature(attn_temperature)
        check_input(z, context, self.num_tokens, 1)
        # A row of offsets for each sample, or every step would spread the one.
        layers = tuple(
            MaskedLayer(layer.weight, layer.offset.expand(len(z), -1).contiguous())
            for layer in self.masked_layers(context)
        )
        weight = layers[0].weight
        return MAFCache(
            tokens=weight.new_zeros(len(z), self.num_tokens),
            hidden=tuple(weight.new_zeros(len(z), self.hidden_features) for _ in layers[:-1]),
            layers=layers,
        )

    def affine(
        self, x: Float[Tensor, "b t 1"], start: int, stop: int, cache: MAFCache
    ) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
        """Log-scale and shift of entries [start, stop); feeds tokens start-1 .. stop-2 and stores their units."""
        first, last = max(start - 1, 0), stop - 1
        cache.tokens[:, first:last] = x[:, first:last, 0]
        inputs, new = cache.tokens[:, :last], slice(self._units_below(first), self._units_below(last))
        *inner, final = cache.layers
        for layer, hidden in zip(inner, cache.hidden, strict=True):
            hidden[:, new] = F.relu(_rows(layer, new, inputs))
            inputs = hidden[:, : new.stop]
        out = _rows(final, slice(2 * start, 2 * stop), inputs)
        return _read_out(out, x.dtype)

    def row_bytes(self) -> int:
        """Tokens, hidden units, offsets of all layers, and the outputs; see `FlowBlock`."""
        values = 2 * (len(self.layers) - 1) * self.hidden_features + 6 * self.num_tokens
        return values * self.layers[0].weight.element_size()

    def exact_inverse(
        self,
        z: Float[Tensor, "b t 1"],
        context: Int[Tensor, " b"] | None = None,
        extrapolation: Extrapolation | None = None,
    ) -> Float[Tensor, "b t 1"] | None:
        """By native code; see `jacobiflow.flows.base.ExactInverse`.

        **Raises** `ValueError` where the extrapolation has an attention temperature: there is no attention here.
        """
        if extrapolation is not None:
            _check_temperature(None if extrapolation.attn_temperature == 1 else extrapolation.attn_temperature)
        # Native code trusts the sizes: tokens of other ones are left to PyTorch, which checks them.
        if usable(z, *self.parameters()) is None or z.shape[1:] != (self.num_tokens, 1):
            return None
        below = tuple(self._units_below(degree) for degree in range(self.num_tokens))
        x = solve_rows(z.squeeze(-1), self.layers, context, extrapolation, below)
        return None if x is None else x.unsqueeze(-1)

    def output_weights(self) -> tuple[Float[Tensor, "t h"], Float[Tensor, "t h"]]:
        """The masked rows of the last layer for `s` and for `u`; see `AffineBlock.output_weights`."""
        weight = self.layers[-1].masked_weight().detach()
        return weight[0::2], weight[1::2]

    @torch.no_grad()
    def normalize_outputs(self, x: Float[Tensor, "b t 1"], labels: Int[Tensor, " b"] | None) -> None:
        """Set the output biases so that every entry of z has mean 0 and standard deviation 1 over the rows of `x`.

        As activation normalisation after the block would (Kingma and Dhariwal, Glow, arXiv 1807.03039), in biases that
        the block has anyway. An entry that hardly varies keeps its scale.
        """
        log_scale, shift = self(x, labels)
        inverse = torch.exp(-log_scale)
        moved = (inverse * (x - shift)).mean(dim=0) / inverse.mean(dim=0)
        spread = (inverse * (x - shift - moved)).std(dim=0, correction=0)
        grown = torch.where(spread > _CONSTANT, spread, 1).log()
        self.layers[-1].bias.add_(torch.stack((grown, moved), dim=1).flatten())

    def _units_below(self, degree: int) -> int:
        """How many units of a hidden layer have a degree below `degree`; they are its first ones."""
        return -(-degree * self.hidden_features // max(self.num_tokens - 1, 1))


def _check_temperature(attn_temperature: object) -> None:
    if attn_temperature is not None:
        raise InputValueError("attn_temperature: a MAF has no attention; leave it at 1")


def full_pass(
    x: Float[Tensor, "b t 1"], layers: Sequence[MaskedLayer]
) -> tuple[Float[Tensor, "b t 1"], Float[Tensor, "b t 1"]]:
    """Log-scale and shift of every entry, by the whole network."""
    h = x.squeeze(-1).to(layers[0].weight.dtype)
    for layer in layers[:-1]:
        h = F.relu(F.linear(h, layer.weight) + layer.offset)
    return _read_out(F.linear(h, layers[-1].weight) + layers[-1].offset, x.dtype)


def _rows(layer: MaskedLayer, rows: slice, inputs: Float[Tensor, "b i"]) -> Float[Tensor, "b n"]:
    """Outputs `rows` of a layer from its first `inputs`; the mask hides all others from them."""
    return torch.addmm(layer.offset[:, rows], inputs, layer.weight[rows, : inputs.shape[1]].T)


def _read_out(out: Float[Tensor, "b n2"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    log_scale, shift = out.to(dtype).unflatten(1, (-1, 2)).chunk(2, dim=-1)
    return log_scale, shift


_MODEL_CARD = """\
---
{{ card_data }}
---

# MAF

A masked autoregressive flow over pixels ([arXiv 1705.07057](https://arxiv.org/abs/1705.07057)).
`jacobiflow.load` takes this folder, or its id on the hub.
"""


@register
class MAF(ImageFlow, tags=["maf"], model_card_template=_MODEL_CARD):
    """Stack of masked affine blocks over the logits of an image's pixels, alternately in raster and in reverse order.

    Images are uniformly dequantised, in [-1, 1].

    **Arguments:**

    - `config`: the shape, a `MAFConfig`.

    Reference: Papamakarios et al., Masked Autoregressive Flow for Density Estimation, arXiv 1705.07057.
    """

    model_type = "maf"
    config_type = MAFConfig
    block_type = MAFBlock
    config: MAFConfig
    blocks: Sequence[MAFBlock]

    def __init__(self, config: MAFConfig) -> None:
        super().__init__(config)

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int
    ) -> MAFConfig:
        """A config from the options of `jacobiflow train`; `channels` and `layers` are of the hidden layers."""
        return MAFConfig(in_channels, image_size, channels, blocks, layers, num_classes)

    @classmethod
    def config_from_shapes(cls, state: Mapping[str, Tensor], config: MAFConfig) -> MAFConfig:
        """See `ImageFlow.config_from_shapes`; a token count is read by the channels of `config`."""
        first = "blocks.0.layers.0."
        try:
            hidden_features, num_tokens = state[f"{first}weight"].shape
        except (KeyError, ValueError):
            raise InputValueError(f"not the weights of a MAF: no matrix {first}weight") from None
        return replace(
            config,
            image_size=math.isqrt(num_tokens // config.in_channels),
            hidden_features=hidden_features,
            num_blocks=count_layers(state, "blocks."),
            hidden_layers=count_layers(state, "blocks.0.layers.") - 1,
            num_classes=len(state[f"{first}class_embed"]) if f"{first}class_embed" in state else 0,
        )

    def to_tokens(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n t 1"], Float[Tensor, " n"]]:
        """y = logit(alpha + (1 - 2 alpha) p) of the pixels p = (image + 1) / 2 in raster order, and log|dy/d image|.

        **Raises** `ValueError` where a pixel is outside [-1, 1] by more than alpha, so that it has no logit.
        """
        pixels, alpha = images.flatten(1).unsqueeze(-1), self.config.logit_alpha
        # Both from the image itself: 1 - p would lose the digits of a p near 1.
        log_p, log_rest = (torch.log(alpha + (0.5 - alpha) * (1 + sign * pixels)) for sign in (1, -1))
        finite = torch.isfinite(log_p) & torch.isfinite(log_rest)
        if not finite.all():
            raise InputValueError(f"image value {float(pixels[~finite][0]):.7g}: a MAF takes images in [-1, 1]")
        log_det = pixels[0].numel() * math.log(0.5 - alpha) - (log_p + log_rest).sum(dim=(1, 2))
        return log_p - log_rest, log_det

    def to_images(self, x: Float[Tensor, "n t 1"]) -> Float[Tensor, "n c h w"]:
        """Inverse of `to_tokens`; within `2 logit_alpha` of [-1, 1]."""
        config = self.config
        images = torch.tanh(x / 2) / (1 - 2 * config.logit_alpha)
        return images.reshape(-1, config.in_channels, config.image_size, config.image_size)

    @torch.no_grad()
    def initialize(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None) -> None:
        """Normalise what each block makes of `images`, one after another; see `MAFBlock.normalize_outputs`."""

        def normalized(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            self.blocks[i].normalize_outputs(x, labels)
            return self.blocks[i](x, labels)

        tokens, _ = self.to_tokens(images)
        for _ in self.walk(tokens, parameters=normalized):
            pass
