"""The noise that training images carry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.data.dataset import ImageDataset

_EVALUATION = 2  # stream of random numbers, beside those of training


@dataclass(frozen=True)
class Noise:
    """What is added to 8-bit images in [-1, 1].

    "gaussian": x + std N(0, 1), as TarFlow's image models. "uniform": dequantisation, each of the 256 levels spread
    evenly over its share of [-1, 1); `std` is 0 then.
    """

    kind: Literal["gaussian", "uniform"]
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("gaussian", "uniform"):
            raise ValueError(f"noise {self.kind!r}: give 'gaussian' or 'uniform'")
        if (self.kind == "gaussian") != (self.std > 0) or not math.isfinite(self.std):
            raise ValueError(f"noise {self.kind!r} of std {self.std}: gaussian needs one above 0, uniform takes 0")


def add_noise(images: Float[Tensor, "n c h w"], noise: Noise, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """`images` in [-1, 1] (on the CPU) with `noise` drawn from `generator`."""
    if noise.kind == "gaussian":
        return images + noise.std * torch.randn(images.shape, generator=generator)
    levels = ((images + 1) * 127.5).round()
    # In steps of 2^-16, which float32 holds beside 255: 255 + torch.rand() may round to 256.
    share = torch.randint(1 << 16, images.shape, generator=generator) / (1 << 16)
    return (levels + share) / 128 - 1


def noisy_images(data: ImageDataset, index: Int[Tensor, " b"], noise: Noise, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """The images of `data` at `index` with `noise`; that of image i depends on `seed` and i only."""
    images, _ = data.batch(index)
    rows = [
        add_noise(image.unsqueeze(0), noise, keyed_generator(seed, _EVALUATION, i))
        for i, image in zip(index.tolist(), images, strict=True)
    ]
    return torch.cat(rows)


def keyed_generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator for draw `index` of kind `stream`, independent of all others."""
    state = np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
