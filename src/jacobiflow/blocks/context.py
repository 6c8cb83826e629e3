"""What the rows of a batch are conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The context of a batch: labels, numbers, the states of texts, or nothing.

    Attributes:
        values: A row for each sample: labels (B,), numbers (B, K) or (B, T, K), or states of texts. `None` without a
            context.
        temperature: Divides the attention logits of each row, for a guided block with attention. `None` stands for 1.

    Example:
        >>> from jacobiflow.blocks.context import Context
        >>> Context(torch.tensor([3, 7]))[1:].values, Context()[1:].values
        (tensor([7]), None)
    """

    values: Tensor | None = None
    temperature: Float[Tensor, " b"] | None = None

    @classmethod
    def of(cls, values: Tensor | Context | None) -> Context:
        """Returns a context as it is, and values as the context that has them."""
        return values if isinstance(values, Context) else cls(values)

    def __getitem__(self, rows: Any) -> Context:
        """Returns the context of some rows, by a slice, a mask or indices."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """Returns the context with `change` applied to each tensor that it has."""
        values, temperature = (None if each is None else change(each) for each in (self.values, self.temperature))
        return Context(values, temperature)

    def to(self, device: torch.device) -> Context:
        """Returns the context on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def with_unconditional(self, unconditional: Callable[[Tensor], Tensor], temperature: float, z: Tensor) -> Context:
        """Returns the context of two rows for each sample of `z`: its own, and an unconditional one after it.

        `unconditional` gives the values of the second rows for those of the first. Their temperature is `temperature`.
        """
        values, temperatures = self.values, None
        if values is not None:
            values = torch.stack((values, unconditional(values)), dim=1).flatten(0, 1)
        if temperature != 1:
            temperatures = z.new_ones(len(z), 2)
            temperatures[:, 1] = temperature
            temperatures = temperatures.flatten()
        return Context(values, temperatures)
