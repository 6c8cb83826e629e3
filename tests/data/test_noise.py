"""Noise is fixed by the seed and the image's place; of the changes that settings allow, all occur, and no other."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jacobiflow.data import Augmentation, ImageDataset, Noise, augment, load_images, noisy_images

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(data: ImageDataset, noise: Noise, seed: int) -> Tensor:
    """All images of `data` with their noise, one at a time, by the definition."""
    rows = []
    for i, levels in enumerate(data.images.double()):
        key = np.random.SeedSequence((seed, 2, i)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key) >> 1)
        if noise.kind == "gaussian":
            rows.append(levels / 127.5 - 1 + noise.std * torch.randn(levels.shape, generator=generator))
        else:
            rows.append((levels + torch.randint(2**16, levels.shape, generator=generator).double() / 2**16) / 128 - 1)
    return torch.stack(rows)


@pytest.mark.parametrize(("noise", "seed"), [(Noise("gaussian", 0.3), 2**63 - 1), (Noise("uniform"), 0)])
def test_images_get_the_noise_of_their_seed_and_place(noise: Noise, seed: int) -> None:
    levels = torch.randint(256, (11, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    data, state = ImageDataset(levels.to(torch.uint8), None), torch.get_rng_state()
    whole = noisy_images(data, torch.arange(11), noise, seed)
    assert whole.dtype == torch.float32
    assert (whole - by_hand(data, noise, seed)).abs().max() < 1e-6
    for index in ([10, 0, 3], [2, 2]):
        assert torch.equal(noisy_images(data, torch.tensor(index), noise, seed), whole[index])
    assert torch.equal(torch.get_rng_state(), state)


def some_emoji(num: int = 60) -> Tensor:
    return load_images("emoji-256", 32, 3).batch(slice(0, 4 * num, 4))[0]


def changed(images: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    before = images.clone()
    found = augment(images, Augmentation(**settings), torch.Generator().manual_seed(seed))
    assert torch.equal(images, before)
    assert found.shape == images.shape and found.dtype == torch.float32
    return found


def test_half_of_the_images_are_mirrored() -> None:
    images = some_emoji()
    assert torch.equal(changed(images), images)  # by default none
    found = changed(images, horizontal_flip=True)
    same = (found == images).all(dim=(1, 2, 3))
    mirrored = (found == images.flip(3)).all(dim=(1, 2, 3))
    assert (same | mirrored).all()
    assert 15 < int(mirrored.sum()) < 45
    assert not torch.equal(changed(images, 1, horizontal_flip=True), found)


def test_images_are_shifted_by_every_number_of_pixels() -> None:
    images, seen = some_emoji(), set()
    moves = {
        (down, right): (torch.arange(32) - down).clamp(0, 31)[:, None] * 32 + (torch.arange(32) - right).clamp(0, 31)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    for seed in range(3):
        for image, found in zip(images, changed(images, seed, translate=1), strict=True):
            pixels = image.flatten(1)
            same = [move for move, places in moves.items() if torch.equal(found, pixels[:, places])]
            assert same, "neither the image nor a shift of it, its border repeated"
            seen.update(same if len(same) == 1 else [])
    assert len(seen) == 9


def test_colours_turn_around_the_axis_of_greys() -> None:
    grey = torch.linspace(-1, 1, 32).view(1, 1, 1, 32).expand(20, 3, 32, 32).contiguous()
    assert (changed(grey, hue=180.0) - grey).abs().max() < 2e-3
    pale = torch.tensor([0.25, 0.1, 0.0]).view(1, 3, 1, 1).expand(400, 3, 2, 2).contiguous()
    found = changed(pale, hue=60.0)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # of brightness, as in Rec. 601
    assert ((found - pale) * weights).sum(dim=1).abs().max() < 1e-4
    colours = [pale[0, :, 0, 0].tolist(), *found[:, :, 0, 0].tolist()]
    i, q = torch.tensor([colorsys.rgb_to_yiq(*colour)[1:] for colour in colours]).T
    angles = torch.rad2deg(torch.atan2(q, i))
    turned = angles[1:] - angles[0]
    assert torch.hypot(i, q).std() < 2e-3
    assert turned.abs().max() < 61
    assert turned.max() > 50 and turned.min() < -50 and abs(float(turned.mean())) < 6
    assert changed(some_emoji(), hue=90.0).abs().max() <= 1


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^hue=181.0: give an angle of at most 180"):
        Augmentation(hue=181.0)
    with pytest.raises(ValueError, match=r"^hue=5.0: images of 1 channels have no hue; give 0"):
        changed(torch.zeros(2, 1, 8, 8), hue=5.0)
    with pytest.raises(ValueError, match=r"^translate=8: give fewer pixels than images of \(8, 8\) have"):
        changed(torch.zeros(2, 1, 8, 8), translate=8)
    for kind, std in (("gaussian", 0.0), ("uniform", 0.1)):
        with pytest.raises(ValueError, match=f"^noise '{kind}'"):
            Noise(kind, std)  # type: ignore[arg-type]
