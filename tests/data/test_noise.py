"""Noise is fixed by the seed and the image's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jacobiflow.data import ImageDataset, Noise, noisy_images

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(data: ImageDataset, noise: Noise, seed: int) -> Tensor:
    """All images of `data` with their noise, one at a time, by the definition."""
    rows = []
    for i, levels in enumerate(data.images.double()):
        key = np.random.SeedSequence((seed, 2, i)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key) >> 1)
        if noise.std:
            rows.append(levels / 127.5 - 1 + noise.std * torch.randn(levels.shape, generator=generator))
        else:
            rows.append((levels + torch.randint(2**16, levels.shape, generator=generator).double() / 2**16) / 128 - 1)
    return torch.stack(rows)


@pytest.mark.parametrize(("noise", "seed"), [(Noise(0.3), 2**63 - 1), (Noise(), 0)])
def test_images_get_the_noise_of_their_seed_and_place(noise: Noise, seed: int) -> None:
    levels = torch.randint(256, (11, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    data, state = ImageDataset(levels.to(torch.uint8), None), torch.get_rng_state()
    whole = noisy_images(data, torch.arange(11), noise, seed)
    assert whole.dtype == torch.float32
    assert (whole - by_hand(data, noise, seed)).abs().max() < 1e-6
    for index in ([10, 0, 3], [2, 2]):
        assert torch.equal(noisy_images(data, torch.tensor(index), noise, seed), whole[index])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"^std=-0\.1"):
        Noise(-0.1)
