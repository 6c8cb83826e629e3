"""Where an iteration starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import check_finite, check_floating, check_kind, short
from jacobiflow.codec import family, register
from jacobiflow.errors import InputTypeError, InputValueError


@family
class Guess(ABC):
    """Chooses X^(0) from the block's input."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """X^(0), a new tensor."""

    def check(self, num_tokens: int, token_channels: int) -> None:  # noqa: B027  most fit any tokens
        """**Raises** `ValueError` where the guess does not fit tokens (T, C)."""

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

    One guess per position; `jacobiflow.calibrate` measures the means. **Raises** `TypeError` where one is no
    tensor of floating-point numbers, `ValueError` where the two differ in shape, are not finite, or do not fit Z.
    """

    log_scale: Float[Tensor, "t c"]
    shift: Float[Tensor, "t c"]

    def __post_init__(self) -> None:
        check_floating("MeanAffine: log_scale", self.log_scale, ("tokens", "channels"))
        check_floating("MeanAffine: shift", self.shift, tuple(self.log_scale.shape))
        check_finite("MeanAffine: log_scale", self.log_scale)
        check_finite("MeanAffine: shift", self.shift)

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        self.check(*z.shape[1:])
        return torch.addcmul(self.shift.to(z), self.log_scale.to(z).exp(), z)

    def check(self, num_tokens: int, token_channels: int) -> None:
        check_shape(self, self.shift, num_tokens, token_channels)

    def __repr__(self) -> str:
        tokens, channels = self.shift.shape
        return f"MeanAffine({tokens} tokens, {channels} channels)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MeanAffine):
            return NotImplemented
        return torch.equal(self.log_scale, other.log_scale) and torch.equal(self.shift, other.shift)

    def __hash__(self) -> int:
        return hash(tuple(self.shift.flatten().tolist()))


@dataclass(frozen=True, eq=False)
class Given(Guess):
    """X^(0) = `value`, an approximate answer that is to be improved."""

    value: Float[Tensor, "b t c"]

    def __post_init__(self) -> None:
        give = "a torch.Tensor of floating-point numbers (B, T, C)"
        check_kind("Given: value", self.value, Tensor, give)
        if not self.value.is_floating_point() or self.value.ndim != 3:
            raise InputTypeError(f"Given: value={short(self.value)}: give {give}")

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        if self.value.shape != z.shape:
            raise InputValueError(
                f"Given: value of shape {tuple(self.value.shape)}, but z is {tuple(z.shape)}: give as many"
            )
        return self.value.clone()

    def __eq__(self, other: object) -> bool:
        return torch.equal(self.value, other.value) if isinstance(other, Given) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.value.shape))


def check_shape(guess: Guess, values: Float[Tensor, "t c"], num_tokens: int, token_channels: int) -> None:
    """**Raises** `ValueError` where a guess has not one of its `values` for each entry of tokens (T, C)."""
    have, want = tuple(values.shape), (num_tokens, token_channels)
    if have != want:
        raise InputValueError(f"{type(guess).__name__} of shape {have}, but the tokens are {want}: calibrate this flow")
