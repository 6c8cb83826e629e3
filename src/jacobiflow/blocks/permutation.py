"""The order in which a block reads the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_choice, check_fields, check_kind, format_value


@dataclass(frozen=True)
class Permutation:
    """The order in which a block reads the tokens: as they are ("identity"), reversed ("flip"), or x[order[0]], ...

    Example:
        >>> from jacobiflow.models import Permutation
        >>> order = Permutation((2, 0, 1))
        >>> x = torch.tensor([[[5.0], [6.0], [7.0]]])
        >>> order(x).flatten().tolist(), torch.equal(order.inverse(order(x)), x)
        ([7.0, 5.0, 6.0], True)
    """

    order: Literal["identity", "flip"] | tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.order, str):
            check_choice("order", self.order, ("identity", "flip"))
            return
        check_kind("order", self.order, tuple, '"identity", "flip" or a tuple of indices')
        check_fields(self)
        if sorted(self.order) != list(range(len(self.order))):
            raise InputValueError(f"order={format_value(self.order)}: give each of 0 to {len(self.order) - 1} once")

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        if isinstance(self.order, str):
            return x.flip(dim) if self.order == "flip" else x
        return x.index_select(dim, torch.tensor(self.order, device=x.device))

    def inverse(self, x: Tensor, dim: int = 1) -> Tensor:
        """Returns the tokens in the order that they had before."""
        if isinstance(self.order, str):
            return self(x, dim)
        return x.index_select(dim, torch.tensor(self.order, device=x.device).argsort())
