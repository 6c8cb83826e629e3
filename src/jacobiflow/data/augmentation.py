"""Noise and other random changes of training images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.data.dataset import ImageDataset
from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_count, check_fields, check_floating, check_kind, check_number, check_seed

_EVALUATION = 2  # The random stream of evaluation; training uses streams 0 and 1.
# Rows that turn RGB into the YIQ space of NTSC: brightness, then two coordinates of colour around the axis of greys.
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


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
    # Steps of 2^-16 are exact in float32 beside 255, but 255 + torch.rand() may round to 256.
    offset = torch.randint(1 << 16, images.shape, generator=generator) / (1 << 16)
    return (levels + offset) / 128 - 1


def noisy_images(data: ImageDataset, index: Int[Tensor, " b"], noise: Noise, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Returns the images of `data` at `index` with noise; the noise of image i depends only on `seed` and i."""
    check_kind("data", data, ImageDataset, "an ImageDataset")
    images, _ = data.batch(index)
    generators = [keyed_generator(seed, _EVALUATION, i) for i in index.tolist()]
    return torch.cat(
        [add_noise(image.unsqueeze(0), noise, generator) for image, generator in zip(images, generators, strict=True)]
    )


def keyed_generator(seed: int, stream: int, index: int) -> torch.Generator:
    """Returns the random generator number `index` of `stream`, independent of all others."""
    state = np.random.SeedSequence((check_seed(seed), stream, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the images of a training step; by default none.

    Args:
        horizontal_flip: Whether to mirror half of the images, left to right.
        translate: Largest translation in pixels, vertically and horizontally. Pixels at the border are repeated.
        hue: Largest rotation of the colours around the axis of greys, in degrees, at most 180.
    """

    horizontal_flip: bool = False
    translate: int = 0
    hue: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("translate", self.translate, minimum=0)
        check_number("hue", self.hue)
        if self.hue > 180:
            raise InputValueError(f"hue={self.hue}: give an angle of at most 180 degrees")


def augment(
    images: Float[Tensor, "n c h w"], augmentation: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Augments images in [-1, 1] on the CPU.

    Example:
        >>> images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
        >>> augment(images, Augmentation(horizontal_flip=True), torch.Generator().manual_seed(0)).flatten().tolist()
        [1.0, 0.0, -1.0]
    """
    check_floating("images", images, ("N", "C", "H", "W"))
    check_kind("augmentation", augmentation, Augmentation, "an Augmentation")
    num, channels, height, width = images.shape
    if augmentation.hue and channels != 3:
        raise InputValueError(f"hue={augmentation.hue}: images of {channels} channels have no hue; give 0")
    translate = augmentation.translate
    if translate >= min(height, width):
        raise InputValueError(f"translate={translate}: give fewer pixels than images of {(height, width)} have")
    if augmentation.horizontal_flip:
        is_flipped = torch.rand(num, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(is_flipped, images.flip(-1), images)
    if translate:
        padded = F.pad(images, 4 * (translate,), mode="replicate")
        corners = torch.randint(2 * translate + 1, (num, 2), generator=generator).tolist()
        crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
        images = torch.stack(crops)
    if augmentation.hue:
        angles = (2 * torch.rand(num, generator=generator) - 1) * math.radians(augmentation.hue)
        images = _rotate_hue(images, angles)
    return images


def _rotate_hue(images: Tensor, angles: Tensor) -> Tensor:
    rotation = torch.zeros(len(images), 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angles.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angles.sin(), angles.sin()
    to_yiq = torch.tensor(_RGB_TO_YIQ)
    matrices = to_yiq.inverse() @ rotation @ to_yiq
    return torch.einsum("nij,njhw->nihw", matrices, images).clamp(-1, 1)
