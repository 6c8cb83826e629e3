"""Where an iteration starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Guess(Protocol):
    """Chooses X^(0) from the block's input."""

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """X^(0), a new tensor."""
        ...


@dataclass(frozen=True)
class Latent:
    """X^(0) = Z, the block's input: neighbouring blocks change an image little (section 3.2 of the paper)."""

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return z.clone()


@dataclass(frozen=True)
class Zeros:
    """X^(0) = [z_1, 0, ..., 0], for blocks in which Z overflows (section 3.2 of the paper)."""

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        x = torch.zeros_like(z)
        x[:, :1] = z[:, :1]
        return x


@dataclass(frozen=True)
class Given:
    """X^(0) = `value`, an approximate answer that is to be improved."""

    value: Float[Tensor, "b t c"]

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return self.value.clone()
