"""Token orders in which a block is causal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from jacobiflow.checks import check_choice


@dataclass(frozen=True)
class Permutation:
    """The order in which a block reads the tokens: raster order, or its reverse.

    Both are their own inverse, so one call maps raster order to causal order and back.
    """

    kind: Literal["identity", "flip"]

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("identity", "flip"))

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.flip(dim) if self.kind == "flip" else x
