"""Differences between samples and the exact samples of the same latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.utils.checks import check_floating, check_kind


@dataclass(frozen=True)
class PixelDifference:
    """Difference between two sets of 8-bit images.

    Attributes:
        share: Share of the values that differ.
        levels: Largest difference of a value, in levels from 0 to 255.
    """

    share: float
    levels: int


@dataclass(frozen=True)
class SampleErrors:
    """Errors of samples against the exact samples of the same latents.

    Attributes:
        num: Number of samples.
        max: Largest difference of an entry, in the samples' units (images: [-1, 1], not clipped).
        mean: Mean difference of an entry, in the same units.
        rms: Root-mean-square difference of an entry, in the same units.
        psnr: For images 20 log10(2 / rms) in dB; infinity if all are equal, minus infinity if one is not finite.
        pixels: For images the difference after rounding to 8 bits.
    """

    num: int
    max: float
    mean: float
    rms: float
    psnr: float | None = None
    pixels: PixelDifference | None = None

    @classmethod
    def merge(cls, parts: Sequence[SampleErrors]) -> SampleErrors:
        """Returns the errors of all samples, from those of parts of them."""
        num, pixels = sum(part.num for part in parts), None
        mean = sum(part.num * part.mean for part in parts) / num
        rms = math.sqrt(sum(part.num * part.rms**2 for part in parts) / num)
        by_part = [(part.num, part.pixels) for part in parts if part.pixels is not None]
        if by_part:
            share = sum(count * each.share for count, each in by_part) / num
            pixels = PixelDifference(share, max(each.levels for _, each in by_part))
        psnr = None if parts[0].psnr is None else _psnr(rms)
        return cls(num, max(part.max for part in parts), mean, rms, psnr, pixels)


def sample_errors(samples: Float[Tensor, "n ..."], exact: Float[Tensor, "n ..."]) -> SampleErrors:
    """Measures the errors of images (N, C, H, W), or of tokens (N, T, C), entry by entry.

    An entry that is NaN in only one of them counts as infinite. An entry that is NaN in both counts as 0, because the
    exact inverse overflows there too.

    Example:
        >>> exact = torch.zeros(2, 1, 4, 4)
        >>> errors = sample_errors(exact + 0.02, exact)
        >>> round(errors.psnr, 3), errors.pixels
        (40.0, PixelDifference(share=1.0, levels=2))
    """
    check_kind("samples", samples, Tensor, "a torch.Tensor of images or tokens")
    check_floating("samples", samples, ("any",) * samples.ndim)
    check_floating("exact", exact, tuple(samples.shape))
    both_nan = samples.isnan() & exact.isnan()
    error = (samples.double() - exact.double()).abs().masked_fill(both_nan, 0).nan_to_num(torch.inf, torch.inf)
    rms = float(error.square().mean().sqrt())
    errors = SampleErrors(len(samples), float(error.max()), float(error.mean()), rms)
    if samples.ndim != 4:
        return errors
    return replace(errors, psnr=_psnr(rms), pixels=pixel_difference(quantize(samples), quantize(exact)))


def _psnr(rms: float) -> float:
    """Returns the PSNR of images, which span [-1, 1]."""
    return 20 * (math.log10(2) - math.log10(rms)) if rms else math.inf


def pixel_difference(images: UInt8[Tensor, "n c h w"], exact: UInt8[Tensor, "n c h w"]) -> PixelDifference:
    """Measures the difference between 8-bit images."""
    levels = (images.short() - exact.short()).abs()
    return PixelDifference(float(levels.ne(0).double().mean()), int(levels.max()))
