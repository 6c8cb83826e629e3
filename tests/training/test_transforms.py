"""Of the changes that settings allow, all occur, and no other."""

from __future__ import annotations

import colorsys
from typing import Any

import pytest
import torch
from torch import Tensor

from jacobiflow.data import load_images
from jacobiflow.training import image_transform


def some_emoji(num: int = 60) -> Tensor:
    return load_images("emoji-256", 32, 3).images[: 4 * num : 4]


def changed(images: Tensor, **settings: Any) -> Tensor:
    transform = image_transform((3, 32, 32), **settings)
    found = torch.stack([transform(image) for image in images])
    assert found.shape == images.shape and found.dtype == torch.uint8
    return found


def test_images_are_mirrored_and_shifted_by_every_number_of_pixels() -> None:
    assert image_transform((3, 32, 32)) is None
    torch.manual_seed(0)
    images, seen, num_mirrored = some_emoji(), set(), 0
    moves = {
        (down, right): (torch.arange(32) - down).clamp(0, 31)[:, None] * 32 + (torch.arange(32) - right).clamp(0, 31)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    for _ in range(3):
        for image, found in zip(images, changed(images, horizontal_flip=True, translate=1), strict=True):
            num_mirrored += not any(torch.equal(found, image.flatten(1)[:, places]) for places in moves.values())
            both = (image.flatten(1), image.flip(2).flatten(1))
            same = {move for move, at in moves.items() if any(torch.equal(found, pixels[:, at]) for pixels in both)}
            assert same, "neither the image nor its mirror, shifted, its border repeated"
            seen |= same
    assert len(seen) == 9 and 60 < num_mirrored < 120


def test_hues_turn_by_at_most_the_angle() -> None:
    torch.manual_seed(0)
    pale = torch.tensor([160, 128, 96], dtype=torch.uint8).view(1, 3, 1, 1).expand(400, 3, 32, 32)
    found = changed(pale, hue=60.0)[:, :, 0, 0].double() / 255
    hues = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] * 360 for colour in found.tolist()])
    turned = (hues - 30 + 180) % 360 - 180
    assert turned.abs().max() < 62
    assert turned.max() > 50 and turned.min() < -50


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^hue=181.0: give an angle of at most 180"):
        image_transform((3, 8, 8), hue=181.0)
    with pytest.raises(ValueError, match=r"^hue=5.0: images of 1 channels have no hue; give 0"):
        image_transform((1, 8, 8), hue=5.0)
    with pytest.raises(ValueError, match=r"^translate=8: give fewer pixels than images of \(8, 8\) have"):
        image_transform((1, 8, 8), translate=8)
