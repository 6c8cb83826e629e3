"""The noise of training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_fields, check_floating, check_kind, check_number, check_seed
from jacobiflow.data.dataset import ImageDataset
from jacobiflow.errors import InputValueError

_EVALUATION = 2  # stream of random numbers, beside those of training


@dataclass(frozen=True)
class Noise:
    """Noise that is added to 8-bit images in [-1, 1].

    Args:
        kind: "gaussian": x + std N(0, 1), as TarFlow's image models. "uniform": dequantisation, each of the 256 levels
            spread evenly over its share of [-1, 1).
        std: Standard deviation of Gaussian noise, above 0; 0 for uniform noise.
    """

    kind: Literal["gaussian", "uniform"]
    std: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("std", self.std)
        if (self.kind == "gaussian") != (self.std > 0):
            raise InputValueError(f"noise {self.kind!r} of std {self.std}: gaussian needs one above 0, uniform takes 0")


def add_noise(images: Float[Tensor, "n c h w"], noise: Noise, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Adds noise to images in [-1, 1] on the CPU.

    Example:
        >>> images = torch.zeros(1, 1, 1, 2)
        >>> add_noise(images, Noise("uniform"), torch.Generator().manual_seed(0)).abs().max() < 1 / 64
        tensor(True)
    """
    check_floating("images", images, ("N", "C", "H", "W"))
    check_kind("noise", noise, Noise, "a Noise, such as Noise('uniform')")
    if noise.kind == "gaussian":
        return images + noise.std * torch.randn(images.shape, generator=generator)
    levels = ((images + 1) * 127.5).round()
    # In steps of 2^-16, which float32 holds beside 255: 255 + torch.rand() may round to 256.
    share = torch.randint(1 << 16, images.shape, generator=generator) / (1 << 16)
    return (levels + share) / 128 - 1


def noisy_images(data: ImageDataset, index: Int[Tensor, " b"], noise: Noise, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Returns the images of `data` at `index` with noise; the noise of image i depends only on `seed` and i."""
    check_kind("data", data, ImageDataset, "an ImageDataset")
    images, _ = data.batch(index)
    rows = [
        add_noise(image.unsqueeze(0), noise, keyed_generator(seed, _EVALUATION, i))
        for i, image in zip(index.tolist(), images, strict=True)
    ]
    return torch.cat(rows)


def keyed_generator(seed: int, stream: int, index: int) -> torch.Generator:
    """Returns a generator for draw `index` of kind `stream`, independent of all others."""
    state = np.random.SeedSequence((check_seed(seed), stream, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
