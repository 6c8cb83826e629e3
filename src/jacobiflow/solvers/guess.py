"""Where an iteration starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.solvers.convolution import StackedKernel, causal_convolution, check_kernel


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


@dataclass(frozen=True, eq=False, repr=False)
class MeanAffine:
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


@dataclass(frozen=True, eq=False, repr=False)
class CausalLinear:
    """X^(0)_t = shift_t + sum over d = 0..w-1 of kernel[d] Z_(t-d): a linear autoregressive guess.

    The least-squares estimate of the solution from the latents of a token and of those before it, one kernel for all
    positions: `jacobiflow.calibrate` fits it. It is what sweeps from `MeanAffine` would mostly find out first.

    **Arguments:** `kernel` (w, C, C), `shift` (T, C). **Raises** `ValueError` where they do not fit each other, or Z.
    """

    kernel: Float[Tensor, "w c c"]
    shift: Float[Tensor, "t c"]

    def __post_init__(self) -> None:
        check_kernel("CausalLinear", self.kernel)
        if not isinstance(self.shift, Tensor) or self.shift.ndim != 2 or self.shift.shape[1] != self.kernel.shape[1]:
            have = f"shape {tuple(self.shift.shape)}" if isinstance(self.shift, Tensor) else repr(self.shift)
            raise ValueError(f"CausalLinear: shift of {have}; give a tensor (tokens, {self.kernel.shape[1]})")
        if not torch.isfinite(self.shift).all():
            raise ValueError("CausalLinear: shift holds a NaN or an infinity; calibrate again")

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        if z.shape[1:] != self.shift.shape:
            have, want = tuple(self.shift.shape), tuple(z.shape[1:])
            raise ValueError(f"CausalLinear of shape {have}, but the tokens are {want}: calibrate this flow")
        return causal_convolution(z, self._stacked, add=self.shift.to(z).expand_as(z))

    @cached_property
    def _stacked(self) -> StackedKernel:
        return StackedKernel(self.kernel)

    def __repr__(self) -> str:
        tokens, channels = self.shift.shape
        return f"CausalLinear({tokens} tokens, {channels} channels, from {len(self.kernel)} latents)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CausalLinear):
            return NotImplemented
        return torch.equal(self.kernel, other.kernel) and torch.equal(self.shift, other.shift)

    def __hash__(self) -> int:
        return hash(tuple(self.shift.flatten().tolist()))


@dataclass(frozen=True)
class Given:
    """X^(0) = `value`, an approximate answer that is to be improved."""

    value: Float[Tensor, "b t c"]

    def __call__(self, z: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return self.value.clone()
