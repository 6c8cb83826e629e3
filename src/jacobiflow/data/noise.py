"""The noise that training adds to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.data.dataset import ImageDataset
from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_fields, check_floating, check_kind, check_number, check_seed

_EVALUATION = 2  # The random stream of evaluation; training uses streams 0, 1 and 3.


@dataclass(frozen=True)
class Noise:
    """The noise added to 8-bit images in [-1, 1].

    Args:
        kind: "gaussian" adds std N(0, 1), as TarFlow's image models do. "uniform" dequantises: it spreads each of the
            256 levels evenly over its share of [-1, 1).
        std: Standard deviation of Gaussian noise; 0 for uniform noise.
    """

    kind: Literal["gaussian", "uniform"]
    std: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("std", self.std)
        if (self.kind == "gaussian") != (self.std > 0):
            raise InputValueError(f"noise {self.kind!r} of std {self.std}: gaussian needs one above 0, uniform takes 0")

    @classmethod
    def of_std(cls, std: float) -> Noise:
        """Returns the noise of a flow whose config has this `noise_std`: Gaussian, or uniform for 0."""
        return cls("gaussian", std) if std else cls("uniform")

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Draws normal numbers, or uniform ones in [0, 1), on the CPU."""
        if self.kind == "gaussian":
            return torch.randn(shape, generator=generator)
        # Steps of 2^-16 are exact in float32 beside 255, but 255 + torch.rand() may round to 256.
        return torch.randint(1 << 16, shape, generator=generator) / (1 << 16)

    def add(self, images: Float[Tensor, "*n"], numbers: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Adds the noise of numbers that `draw` gave to images in [-1, 1]."""
        if self.kind == "gaussian":
            return images + self.std * numbers
        return (((images + 1) * 127.5).round() + numbers) / 128 - 1


def add_noise(
    images: Float[Tensor, "*n c h w"], noise: Noise, generator: torch.Generator | None = None
) -> Float[Tensor, "*n c h w"]:
    """Adds noise to images in [-1, 1] on the CPU, by default from PyTorch's global generator.

    Example:
        >>> images = torch.zeros(1, 1, 1, 2)
        >>> add_noise(images, Noise("uniform"), torch.Generator().manual_seed(0)).abs().max() < 1 / 64
        tensor(True)
    """
    check_floating("images", images, ("any",) * max(images.ndim, 3))
    check_kind("noise", noise, Noise, "a Noise, such as Noise('uniform')")
    return noise.add(images, noise.draw(images.shape, generator))


def noisy_images(data: ImageDataset, index: Int[Tensor, " b"], noise: Noise, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Returns the images of `data` at `index` with noise; the noise of image i depends only on `seed` and i."""
    check_kind("data", data, ImageDataset, "an ImageDataset")
    images, _ = data.batch(index)
    generators = [keyed_generator(seed, _EVALUATION, i) for i in index.tolist()]
    return torch.stack(
        [add_noise(image, noise, generator) for image, generator in zip(images, generators, strict=True)]
    )


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """Returns the random generator of a key. PyTorch uses 32 bits of its seed, so two keys rarely share one."""
    return torch.Generator().manual_seed(keyed_seed(seed, *key))


def keyed_seed(seed: int, *key: int) -> int:
    """Returns the seed of a key, below 2^63."""
    state = np.random.SeedSequence((check_seed(seed), *key)).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))
