"""The context of the rows of a batch: what they are conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """The context of a batch: labels, numbers, states of texts, or nothing.

    Attributes:
        values: A row for each sample: labels (B,), numbers (B, K) or (B, T, K), or states of texts (B, L, K). `None`
            without a context.
        temperature: Divides the attention logits of each row, under guidance. `None` if all are 1.

    Example:
        >>> context = Context(torch.tensor([3, 7]))
        >>> context[1:].values, Context()[1:].values
        (tensor([7]), None)
    """

    values: Tensor | None = None
    temperature: Float[Tensor, " b"] | None = None

    @classmethod
    def of(cls, values: Tensor | Context | None) -> Context:
        """Returns the context with these values; a context is returned as it is."""
        return values if isinstance(values, Context) else cls(values)

    def __getitem__(self, rows: Any) -> Context:
        """Returns the context of some rows: a slice, a mask or indices."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """Returns the context with `change` applied to each of its tensors."""
        values = None if self.values is None else change(self.values)
        return Context(values, None if self.temperature is None else change(self.temperature))

    def interleaved(self, other: Context) -> Context:
        """Returns the context of each row, followed by that of the same row of `other`."""

        def interleave(own: Tensor | None, others: Tensor | None) -> Tensor | None:
            return None if own is None or others is None else torch.stack((own, others), dim=1).flatten(0, 1)

        return Context(interleave(self.values, other.values), interleave(self.temperature, other.temperature))

    def to(self, device: torch.device) -> Context:
        """Returns the context on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def clone(self) -> Context:
        """Returns a copy, whose rows may be overwritten."""
        return self.map(torch.clone)


NO_CONTEXT = Context()


@dataclass(frozen=True, eq=False)
class GuidedRows:
    """The two rows that a network evaluates for each sample under guidance, and how their parameters are combined.

    Attributes:
        conditional, unconditional: Their contexts.
        weights: w_t of the log-scale and of the shift, see `Guidance`.
        rule: "linear" or "density".
    """

    conditional: Context
    unconditional: Context
    weights: tuple[Float[Tensor, " t"], Float[Tensor, " t"]]
    rule: str
