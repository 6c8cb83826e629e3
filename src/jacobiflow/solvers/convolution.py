"""Causal convolution over tokens: what the calibrated guess and correction are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def check_kernel(owner: str, kernel: object) -> None:
    """**Raises** `ValueError` where `kernel` is no finite tensor (w, C, C)."""
    if not isinstance(kernel, Tensor) or kernel.ndim != 3 or kernel.shape[1] != kernel.shape[2] or not len(kernel):
        have = f"shape {tuple(kernel.shape)}" if isinstance(kernel, Tensor) else repr(kernel)
        raise ValueError(f"{owner}: kernel of {have}; give a tensor (tokens, channels, channels)")
    if not torch.isfinite(kernel).all():
        raise ValueError(f"{owner}: kernel holds a NaN or an infinity; calibrate again")


def filter_of(kernel: Float[Tensor, "w c c"]) -> Float[Tensor, "c c w"]:
    """`kernel` as `causal_convolution` takes it."""
    return kernel.flip(0).permute(1, 2, 0).contiguous()


def causal_convolution(
    x: Float[Tensor, "b n c"], filter: Float[Tensor, "c c w"], delay: int = 0
) -> Float[Tensor, "b n c"]:
    """y_t = sum over d = 0..w-1 of kernel[d] x_(t - d - delay), with `filter` = `filter_of(kernel)`; 0 before."""
    padded = F.pad(x.transpose(1, 2), (filter.shape[2] - 1 + delay, -delay))
    return F.conv1d(padded, filter).transpose(1, 2)
