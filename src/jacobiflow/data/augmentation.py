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

_EVALUATION = 2  # stream of random numbers, beside those of training
# Brightness, and two coordinates of colour around the axis of greys (the YIQ space of NTSC television).
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


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


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each image, each time it is seen; by default none.

    Args:
        mirror: Mirrors half of the images, left to right.
        shift: Moves each image by up to so many pixels down or up, right or left; pixels of the border are repeated.
        hue: Turns colours around the axis of greys by up to so many degrees either way.
    """

    mirror: bool = False
    shift: int = 0
    hue: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("shift", self.shift, minimum=0)
        check_number("hue", self.hue)
        if self.hue > 180:
            raise InputValueError(f"hue={self.hue}: give an angle of at most 180 degrees")


def augment(
    images: Float[Tensor, "n c h w"], augmentation: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Augments images in [-1, 1] on the CPU.

    Example:
        >>> images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
        >>> augment(images, Augmentation(mirror=True), torch.Generator().manual_seed(0)).flatten().tolist()
        [1.0, 0.0, -1.0]
    """
    check_floating("images", images, ("N", "C", "H", "W"))
    check_kind("augmentation", augmentation, Augmentation, "an Augmentation")
    num, channels, height, width = images.shape
    if augmentation.hue and channels != 3:
        raise InputValueError(f"hue={augmentation.hue}: images of {channels} channels have no hue; give 0")
    if augmentation.shift >= min(height, width):
        raise InputValueError(f"shift={augmentation.shift}: give fewer pixels than images of {(height, width)} have")
    if augmentation.mirror:
        mirrored = torch.rand(num, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    if augmentation.shift:
        padded = F.pad(images, 4 * (augmentation.shift,), mode="replicate")
        corners = torch.randint(2 * augmentation.shift + 1, (num, 2), generator=generator).tolist()
        windows = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
        images = torch.stack(windows)
    if augmentation.hue:
        angles = (2 * torch.rand(num, generator=generator) - 1) * math.radians(augmentation.hue)
        images = _turn_hue(images, angles)
    return images


def _turn_hue(images: Tensor, angles: Tensor) -> Tensor:
    turn = torch.zeros(len(images), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angles.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angles.sin(), angles.sin()
    to_yiq = torch.tensor(_YIQ)
    change = to_yiq.inverse() @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", change, images).clamp(-1, 1)
