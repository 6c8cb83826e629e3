"""How close samples are to the exact inverse of the same latents, and how large their certificates are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jacobiflow.data import quantize
from jacobiflow.measuring import paired_error

_PEAK = 2.0  # images span [-1, 1]


@dataclass(frozen=True)
class PixelDifference:
    """Two sets of 8-bit images: the `share` of pixels that differ, and the largest difference, in `levels`."""

    share: float
    levels: int


@dataclass(frozen=True)
class Fidelity:
    """Images compared with the exact ones of the same latents.

    **Attributes:** `num` images; `max` and `rms`, the largest and the root-mean-square difference of an entry, in the
    images' units ([-1, 1], not clipped); `psnr`, 20 log10(2 / rms), in dB, infinity where all are equal, minus infinity
    where one is not finite; `pixels`, a `PixelDifference` after rounding to 8 bits.
    """

    num: int
    max: float
    rms: float
    psnr: float
    pixels: PixelDifference


def fidelity(images: Float[Tensor, "n c h w"], exact: Float[Tensor, "n c h w"]) -> Fidelity:
    """`Fidelity` of images; entries that are NaN in both count as equal, see `jacobiflow.measuring.paired_error`."""
    error = paired_error(images, exact)
    psnr = 20 * (math.log10(_PEAK) - math.log10(error.rms)) if error.rms else math.inf
    rounded = [quantize(side.nan_to_num(nan=-1.0)) for side in (images, exact)]
    return Fidelity(len(images), error.max, error.rms, psnr, pixel_difference(*rounded))


def pixel_difference(images: UInt8[Tensor, "n c h w"], exact: UInt8[Tensor, "n c h w"]) -> PixelDifference:
    """`PixelDifference` of 8-bit images."""
    levels = (images.short() - exact.short()).abs()
    return PixelDifference(float(levels.ne(0).double().mean()), int(levels.max()))


def certificate_histogram(certificate: Float[Tensor, " n"]) -> dict[str, Any]:
    """A histogram of certificates.

    **Returns** a JSON value: `edges`, which are 1, 2 and 5 times powers of ten around all finite positive certificates;
    `counts` from each edge up to the next; `zero` and `infinite`, how many are 0 or not finite; `median` and `max`.
    """
    value = certificate.double()
    finite = value[torch.isfinite(value) & (value > 0)]
    low, high = (math.floor(math.log10(v)) for v in (finite.min(), finite.max())) if len(finite) else (0, -1)
    powers = range(low - 1, high + 3)  # a logarithm may round across a power
    edges = [edge for k in powers for m in (1, 2, 5) if math.isfinite(edge := float(f"{m}e{k}"))]
    bins = torch.bucketize(finite, torch.tensor(edges, dtype=torch.float64), right=True)
    counts = torch.bincount(bins, minlength=len(edges) + 1).tolist()[1:-1]
    while counts and not counts[0]:
        edges, counts = edges[1:], counts[1:]
    while counts and not counts[-1]:
        edges, counts = edges[:-1], counts[:-1]
    return {
        "edges": edges if counts else [],
        "counts": counts,
        "zero": int((value == 0).sum()),
        "infinite": int((~torch.isfinite(value)).sum()),
        "median": float(value.median()),
        "max": float(value.max()),
    }
