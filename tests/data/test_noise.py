"""The noise of images: its distribution, and that it is fixed by the seed and the image's place alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jacobiflow.data import ImageDataset, Noise, add_noise, noisy_images

pytestmark = pytest.mark.usefixtures("one_thread")

NOISES = (Noise("gaussian", 0.3), Noise("uniform"))
EVERY = torch.arange(11)


def some_data() -> ImageDataset:
    levels = torch.randint(256, (11, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    return ImageDataset(levels.to(torch.uint8), torch.arange(11) % 3)


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


@pytest.mark.parametrize(("noise", "seed"), [(NOISES[0], 2**63 - 1), (NOISES[1], 0)])
def test_images_get_the_noise_of_their_seed_and_place(noise: Noise, seed: int) -> None:
    data = some_data()
    whole = noisy_images(data, EVERY, noise, seed)
    assert whole.dtype == torch.float32
    assert (whole - by_hand(data, noise, seed)).abs().max() < 1e-6
    assert torch.equal(data.images, some_data().images)
    state = torch.get_rng_state()
    for index in ([10, 0, 3], [2, 2], [7]):
        assert torch.equal(noisy_images(data, torch.tensor(index), noise, seed), whole[index])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisy_images(data, EVERY, noise, seed=1), whole)


def test_uniform_noise_spreads_each_level_over_its_share() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 50, 50)
    images, _ = ImageDataset(pixels.contiguous(), None).batch(slice(None))
    noisy = add_noise(images, Noise("uniform"), torch.Generator().manual_seed(0)).double()
    assert noisy.min() >= -1 and noisy.max() < 1
    share = (noisy + 1) * 128 - pixels
    assert share.min() >= 0 and share.max() < 1, "a pixel left the share of its level"
    # The mean and variance of 2,500 uniform draws, each within five standard deviations.
    assert (share.mean(dim=(1, 2, 3)) - 1 / 2).abs().max() < 5 * math.sqrt(1 / 12 / 2500)
    assert (share.var(dim=(1, 2, 3)) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 2500)


@pytest.mark.parametrize(("kind", "std"), [("gaussian", 0.0), ("gaussian", math.nan), ("uniform", 0.1), ("pink", 0.1)])
def test_noise_out_of_range_is_refused(kind: Any, std: float) -> None:
    with pytest.raises(ValueError, match=f"^noise '{kind}'"):
        Noise(kind, std)
