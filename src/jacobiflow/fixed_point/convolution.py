"""Causal convolution over tokens for the fitted guess and correction, whose fields are tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.utils.checks import check_finite, check_floating

_MAX_REGRESSORS = 4_194_304
"""The largest number of regressors that are in memory at a time."""
FIT_WIDTH = 24
"""Tokens before one that a fitted kernel reads."""


class TensorFields:
    """Base of dataclasses whose fields are tensors: equal if their values are, and shown by their shapes."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and all(map(torch.equal, self._tensors(), other._tensors()))

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self: Any) -> str:
        shapes = [f"{entry.name}={tuple(getattr(self, entry.name).shape)}" for entry in fields(self)]
        return f"{type(self).__name__}({', '.join(shapes)})"

    def _tensors(self: Any) -> list[Tensor]:
        return [getattr(self, entry.name) for entry in fields(self)]


class Convolution(TensorFields):
    """Base of dataclasses with a `kernel` (w, C, C): entry d is for the token d places before."""

    kernel: Tensor

    def check_kernel(self) -> None:
        """Raises TypeError or ValueError if the kernel is not a finite tensor (w, C, C)."""
        name = f"{type(self).__name__}: kernel"
        check_values(name, self.kernel, ("tokens", "token_dim", "token_dim"))
        check_values(name, self.kernel, ("tokens", "token_dim", self.kernel.shape[1]))

    def convolve(
        self, x: Float[Tensor, "b n c"], add: Float[Tensor, "b n c"], delay: int = 0
    ) -> Float[Tensor, "b n c"]:
        """Returns y_t = add_t + sum over d = 0..w-1 of kernel[d] x_(t - d - delay), x being 0 before its first token.

        It is a product of matrices.
        """
        width = len(self.kernel)
        # A row per channel of each token, the oldest first. On a GPU, the copy of a small kernel waits for nothing.
        weights = self.kernel.to(x, non_blocking=True).flip(0).transpose(1, 2).flatten(0, 1)
        rows = max(_MAX_REGRESSORS // (x.shape[1] * len(weights)), 1)

        def convolved(part: Tensor, added: Tensor) -> Tensor:
            return torch.addmm(added.flatten(0, 1), rows_before(part, width, delay), weights)

        with torch.autocast(x.device.type, enabled=False):  # autocast is for networks; tokens keep their dtype
            return torch.cat([*map(convolved, x.split(rows), add.split(rows))]).view(x.shape)


def check_values(name: str, values: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises TypeError or ValueError if `values` is not a finite tensor of that shape."""
    check_floating(name, values, shape)
    check_finite(name, values)


def rows_before(x: Float[Tensor, "b t c"], width: int, delay: int = 0) -> Float[Tensor, "n f"]:
    """Returns the regressors of a kernel: per token the `width` up to the one `delay` before it, the oldest first."""
    padded = F.pad(x, (0, 0, width - 1 + delay, -delay))
    return padded.unfold(1, width, 1).transpose(2, 3).flatten(2).flatten(0, 1)


def as_kernel(weights: Float[Tensor, "f c"], width: int) -> Float[Tensor, "w c c"]:
    """Returns the regression weights of `rows_before` as a kernel."""
    return weights.unflatten(0, (width, -1)).flip(0).transpose(1, 2).contiguous()
