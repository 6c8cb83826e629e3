"""The masked dense network (MADE, arXiv 1502.03509) of a MAF block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.base import ScaleShift
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.models.labels import embed_classes


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
        self.class_embed = nn.Parameter(torch.zeros(num_classes, len(out_degrees))) if num_classes else None

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
    return split_outputs(F.linear(h, layers[-1].weight) + layers[-1].offset, x.dtype)


def count_units_below(degree: int, tokens: int, units: int) -> int:
    """Returns the number of units of a hidden layer with a degree below `degree`; they are its first ones."""
    return -(-degree * units // max(tokens - 1, 1))


def run_rows(layer: MaskedLayer, rows: slice, inputs: Float[Tensor, "b i"]) -> Float[Tensor, "b n"]:
    """Returns outputs `rows` of a layer from its first `inputs`; the mask hides all other inputs from them."""
    return torch.addmm(layer.offset[:, rows], inputs, layer.weight[rows, : inputs.shape[1]].T)


def split_outputs(out: Float[Tensor, "b n2"], dtype: torch.dtype) -> ScaleShift:
    """Returns log-scale and shift, which are alternate outputs of the last layer."""
    log_scale, shift = out.to(dtype).unflatten(1, (-1, 2)).chunk(2, dim=-1)
    return log_scale, shift
