"""Random changes of training images that leave what they show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.checks import check_count, check_fields, check_floating, check_kind, check_number
from jacobiflow.errors import InputValueError

# Brightness, and two coordinates of colour around the axis of greys (the YIQ space of NTSC television).
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


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
        check_count("shift", self.shift, least=0)
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
    if augmentation.hue and images.shape[1] != 3:
        raise InputValueError(f"hue={augmentation.hue}: images of {images.shape[1]} channels have no hue; give 0")
    if augmentation.shift >= min(images.shape[2:]):
        raise InputValueError(
            f"shift={augmentation.shift}: give fewer pixels than images of {tuple(images.shape[2:])} have"
        )
    if augmentation.mirror:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    if augmentation.shift:
        images = _shift(images, augmentation.shift, generator)
    if augmentation.hue:
        images = _turn_hue(images, math.radians(augmentation.hue), generator)
    return images


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    _, _, height, width = images.shape
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    corners = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


def _turn_hue(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    angles = (2 * torch.rand(len(images), generator=generator) - 1) * most
    turn = torch.zeros(len(images), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angles.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angles.sin(), angles.sin()
    to_yiq = torch.tensor(_YIQ)
    change = to_yiq.inverse() @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", change, images).clamp(-1, 1)
