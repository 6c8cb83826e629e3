"""A guess of your own: the latents, each channel scaled as the solutions are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import jacobiflow as jf


@jf.register_piece("scaled_latent")
@dataclass(frozen=True)
class ScaledLatent(jf.Guess):
    """X^(0) = scale Z, with a number for each channel."""

    scale: tuple[float, ...]

    def __call__(self, z: Tensor) -> Tensor:
        return z * z.new_tensor(self.scale)

    @classmethod
    def fit(cls, x: Tensor, z: Tensor) -> jf.Guess:
        """The scale by which the guess is nearest to the solutions `x`."""
        scale = (x * z).sum(dim=(0, 1)) / z.square().sum(dim=(0, 1))
        return cls(tuple(scale.double().tolist()))
