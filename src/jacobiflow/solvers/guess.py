"""Where an iteration starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.codec import family, register


@family
class Guess(ABC):
    """Chooses X^(0) from the block's input."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """X^(0), a new tensor."""

    @classmethod
    def fit(cls, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"]) -> Guess | None:
        """The guess of this kind that suits a block with solutions `x` at `z`, for `jacobiflow.tune` to try.

        `None` where there is nothing to fit.
        """
        return None


@register("latent")
@dataclass(frozen=True)
class Latent(Guess):
    """X^(0) = Z, the block's input: neighbouring blocks change an image little (section 3.2 of the paper)."""

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return z.clone()


@register("zeros")
@dataclass(frozen=True)
class Zeros(Guess):
    """X^(0) = [z_1, 0, ..., 0], for blocks in which Z overflows (section 3.2 of the paper)."""

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        x = torch.zeros_like(z)
        x[:, :1] = z[:, :1]
        return x


@register("mean_affine")
@dataclass(frozen=True, eq=False, repr=False)
class MeanAffine(Guess):
    """X^(0) = exp(log_scale) Z + shift: the mean parameters of the block over calibration images, (T, C) each.

    One guess per position; `jacobiflow.calibrate` measures the means. **Raises** `ValueError` where the two differ in
    shape, or do not fit Z.
    """

    log_scale: Float[Tensor, "t c"]
    shift: Float[Tensor, "t c"]

    def __post_init__(self) -> None:
        for name in ("log_scale", "shift"):
            if not isinstance(getattr(self, name), Tensor):
                raise ValueError(f"MeanAffine: {name} {getattr(self, name)!r}: give a tensor (tokens, channels)")
        if self.log_scale.ndim != 2 or self.log_scale.shape != self.shift.shape:
            have = f"{tuple(self.log_scale.shape)} and {tuple(self.shift.shape)}"
            raise ValueError(f"MeanAffine: log_scale and shift of shapes {have}; give both as (tokens, channels)")

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        if z.shape[1:] != self.shift.shape:
            have, want = tuple(self.shift.shape), tuple(z.shape[1:])
            raise ValueError(f"MeanAffine of shape {have}, but the tokens are {want}: calibrate this flow")
        return torch.addcmul(self.shift.to(z), self.log_scale.to(z).exp(), z)

    def __repr__(self) -> str:
        tokens, channels = self.shift.shape
        return f"MeanAffine({tokens} tokens, {channels} channels)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MeanAffine):
            return NotImplemented
        return torch.equal(self.log_scale, other.log_scale) and torch.equal(self.shift, other.shift)

    def __hash__(self) -> int:
        return hash(tuple(self.shift.flatten().tolist()))


@dataclass(frozen=True)
class Given(Guess):
    """X^(0) = `value`, an approximate answer that is to be improved."""

    value: Float[Tensor, "b t c"]

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return self.value.clone()
