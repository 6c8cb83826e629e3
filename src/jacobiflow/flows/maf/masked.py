"""Masked dense layers, as a MADE (arXiv 1502.03509) is made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.flows.labels import embed_classes


class MaskedLayer(NamedTuple):
    """A masked layer with all that does not change while tokens do: h -> h weight^T + offset.

    `weight` (outputs, inputs) is 0 where the mask is, `offset` (B or 1, outputs) the bias plus the class's part.
    """

    weight: Float[Tensor, "o i"]
    offset: Float[Tensor, "#b o"]


class MaskedLinear(nn.Module):
    """A dense layer in which an output of degree d sees the inputs of degree d and below, with a bias per class.

    The mask follows from the degrees, and is made where it is needed: there is no buffer to store.
    """

    def __init__(self, in_degrees: np.ndarray, out_degrees: np.ndarray, num_classes: int) -> None:
        super().__init__()
        self.in_degrees, self.out_degrees = in_degrees, out_degrees
        dense = nn.Linear(len(in_degrees), len(out_degrees))
        self.weight, self.bias = dense.weight, dense.bias
        self.class_embed = nn.Parameter(torch.zeros(num_classes, len(out_degrees))) if num_classes else None

    def masked(self, labels: Int[Tensor, " b"] | None) -> MaskedLayer:
        """The layer for rows of these labels; `None`, or one below 0, takes the mean over classes."""
        return MaskedLayer(self.masked_weight(), self.offset(labels))

    def offset(self, labels: Int[Tensor, " b"] | None) -> Float[Tensor, "#b o"]:
        """The bias plus the class's part."""
        classes = embed_classes(self.class_embed, labels)
        return self.bias.unsqueeze(0) if classes is None else self.bias + classes

    def masked_weight(self) -> Float[Tensor, "o i"]:
        """The weight, 0 where the mask is."""
        seen, by = (torch.from_numpy(d).to(self.weight.device) for d in (self.in_degrees, self.out_degrees))
        return self.weight.masked_fill(by.unsqueeze(1) < seen, 0)
