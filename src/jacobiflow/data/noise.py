"""The noise that training adds to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.data.dataset import ImageDataset
from jacobiflow.utils.checks import check_fields, check_number, check_seed

_EVALUATION = 2  # The random stream of evaluation; training uses stream 0.


@dataclass(frozen=True)
class Noise:
    """The noise added to 8-bit images in [-1, 1].

    Args:
        std: Standard deviation of Gaussian noise, as TarFlow's image models have. The default, 0, means uniform
            dequantisation: each of the 256 levels is spread evenly over its share of [-1, 1).

    Example:
        >>> images, noise = torch.zeros(1, 1, 1, 2), Noise()
        >>> noise.add(images, noise.draw(images.shape)).abs().max() < 1 / 64
        tensor(True)
    """

    std: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("std", self.std)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Draws normal numbers, or uniform ones in [0, 1) if `std` is 0, on the CPU."""
        if self.std:
            return torch.randn(shape, generator=generator, device="cpu")
        # Steps of 2^-16 are exact in float32 beside 255, but 255 + torch.rand() may round to 256.
        return torch.randint(1 << 16, shape, generator=generator, device="cpu") / (1 << 16)

    def add(self, images: Float[Tensor, "*n"], numbers: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Adds the noise of numbers that `draw` gave to images in [-1, 1]."""
        if self.std:
            return images + self.std * numbers
        return (((images + 1) * 127.5).round() + numbers) / 128 - 1


def noisy_images(data: ImageDataset, index: Int[Tensor, " b"], noise: Noise, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Returns the images of `data` at `index` with noise; the noise of image i depends only on `seed` and i."""
    images, _ = data.batch(index)
    generators = [keyed_generator(seed, _EVALUATION, i) for i in index.tolist()]
    return noise.add(images, torch.stack([noise.draw(images.shape[1:], generator) for generator in generators]))


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """Returns the random generator of a key. PyTorch uses 32 bits of its seed, so two keys rarely share one."""
    state = np.random.SeedSequence((check_seed(seed), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
