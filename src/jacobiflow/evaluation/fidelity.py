"""Errors of samples against the exact inverse of the same latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.measuring import paired_error

_PEAK = 2.0  # images span [-1, 1]


@dataclass(frozen=True)
class PixelDifference:
    """Differences between two sets of 8-bit images.

    Attributes:
        share: The share of pixels that differ.
        levels: The largest difference.
    """

    share: float
    levels: int


@dataclass(frozen=True)
class Fidelity:
    """Errors of images against the exact ones of the same latents.

    Attributes:
        num: The number of images.
        max: The largest difference of an entry, in the images' units ([-1, 1], not clipped).
        rms: The root-mean-square difference of an entry.
        psnr: 20 log10(2 / rms) in dB; infinity if all are equal, minus infinity if one is not finite.
        pixels: The difference after rounding to 8 bits.
    """

    num: int
    max: float
    rms: float
    psnr: float
    pixels: PixelDifference


def fidelity(images: Float[Tensor, "n c h w"], exact: Float[Tensor, "n c h w"]) -> Fidelity:
    """Compares images with the exact ones; entries that are NaN in both count as equal.

    Example:
        >>> exact = torch.zeros(2, 1, 4, 4)
        >>> errors = fidelity(exact + 0.02, exact)
        >>> round(errors.psnr, 3), errors.pixels
        (40.0, PixelDifference(share=1.0, levels=2))
    """
    error = paired_error(images, exact)
    psnr = 20 * (math.log10(_PEAK) - math.log10(error.rms)) if error.rms else math.inf
    rounded = [quantize(side.nan_to_num(nan=-1.0)) for side in (images, exact)]
    return Fidelity(len(images), error.max, error.rms, psnr, pixel_difference(*rounded))


def pixel_difference(images: UInt8[Tensor, "n c h w"], exact: UInt8[Tensor, "n c h w"]) -> PixelDifference:
    """Compares 8-bit images."""
    levels = (images.short() - exact.short()).abs()
    return PixelDifference(float(levels.ne(0).double().mean()), int(levels.max()))
