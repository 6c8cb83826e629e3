"""Changes to training images that leave what they show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.checks import check_count, check_flag, check_floating, check_kind, check_number, convert_numbers
from jacobiflow.errors import InputValueError

# Brightness, and two coordinates of colour around the axis of greys (the YIQ space of NTSC television).
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class Augmentation:
    """What training changes at random in each image, each time it is seen; by default nothing.

    `mirror`: left and right are exchanged in half of the images. `shift`: moved by up to so many pixels down or up,
    right or left; the pixels of the border are repeated. `hue`: colours turn around the axis of greys by an angle of up
    to so many degrees either way; white, black and grey stay.
    """

    mirror: bool = False
    shift: int = 0
    hue: float = 0.0

    def __post_init__(self) -> None:
        convert_numbers(self)
        check_flag("mirror", self.mirror)
        check_count("shift", self.shift, least=0)
        check_number("hue", self.hue)
        if self.hue > 180:
            raise InputValueError(f"hue={self.hue}: give an angle of at most 180 degrees")


def augment(
    images: Float[Tensor, "n c h w"], augmentation: Augmentation, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """`images` in [-1, 1] (on the CPU), each changed as `generator` draws; colours are clipped to [-1, 1].

    **Raises** `ValueError` where a hue should turn and the images have no three channels, or a shift is as large as
    the images.
    """
    check_floating("images", images, ("N", "C", "H", "W"))
    check_kind("augmentation", augmentation, Augmentation, "an Augmentation")
    check_kind("generator", generator, torch.Generator, "a torch.Generator")
    if augmentation.hue and images.shape[1] != 3:
        raise InputValueError(f"hue={augmentation.hue}: images of {images.shape[1]} channels have no hue; give 0")
    if augmentation.shift >= min(images.shape[2:]):
        raise InputValueError(
            f"shift={augmentation.shift}: give fewer pixels than images of {tuple(images.shape[2:])} have"
        )
    if augmentation.mirror:
        flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(flipped, images.flip(-1), images)
    if augmentation.shift:
        images = _shifted(images, augmentation.shift, generator)
    if augmentation.hue:
        images = _turned(images, math.radians(augmentation.hue), generator)
    return images


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    _, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    corners = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    rows = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(rows)


def _turned(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    angles = (2 * torch.rand(len(images), generator=generator) - 1) * most
    turn = torch.zeros(len(images), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angles.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angles.sin(), angles.sin()
    to_yiq = torch.tensor(_YIQ)
    change = to_yiq.inverse() @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", change, images).clamp(-1, 1)
