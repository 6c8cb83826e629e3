"""The noise of an image: fixed by the seed and the image's place in its data set, and by nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import make_flow
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import ImageDataset, Noise, noisy_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim

pytestmark = pytest.mark.usefixtures("one_thread")

NOISES = (Noise("gaussian", 0.3), Noise("uniform"))
EVERY = torch.arange(11)


def some_data(channels: int = 1) -> ImageDataset:
    levels = torch.randint(256, (11, channels, 6, 6), generator=torch.Generator().manual_seed(0))
    return ImageDataset(levels.to(torch.uint8), torch.arange(11) % 3)


def by_hand(data: ImageDataset, noise: Noise, seed: int) -> Tensor:
    """All images of `data` with their noise, one at a time: as `bits_per_dim` drew it before there was a function."""
    rows = []
    for i, levels in enumerate(data.images.double()):
        key = np.random.SeedSequence((seed, 2, i)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key) >> 1)
        if noise.kind == "gaussian":
            drawn = torch.randn((1, *levels.shape), generator=generator)[0]
            rows.append(levels / 127.5 - 1 + noise.std * drawn)
        else:
            share = torch.randint(2**16, (1, *levels.shape), generator=generator)[0].double() / 2**16
            rows.append((levels + share) / 128 - 1)
    return torch.stack(rows)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_images_get_the_noise_of_their_seed_and_place(noise: Noise, channels: int, seed: int) -> None:
    data = some_data(channels)
    noisy = noisy_images(data, EVERY, noise, seed)
    assert noisy.dtype == torch.float32
    assert (noisy - by_hand(data, noise, seed)).abs().max() < 1e-6
    assert torch.equal(data.images, some_data(channels).images)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_does_not_depend_on_the_batch_or_its_order(noise: Noise) -> None:
    data = some_data()
    whole = noisy_images(data, EVERY, noise, seed=5)
    for size in (1, 4, 11):
        assert torch.equal(torch.cat([noisy_images(data, part, noise, seed=5) for part in EVERY.split(size)]), whole)
    for index in ([10, 0, 3], [2, 2], [7], list(range(10, -1, -1))):
        assert torch.equal(noisy_images(data, torch.tensor(index), noise, seed=5), whole[index])
    torch.manual_seed(1)  # nor on the global generator, which is left as it is
    before = torch.get_rng_state()
    assert torch.equal(noisy_images(data, EVERY, noise, seed=5), whole)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_differs_between_seeds_and_images(noise: Noise) -> None:
    grey = ImageDataset(torch.full((11, 1, 6, 6), 100, dtype=torch.uint8), None)
    drawn = torch.cat([noisy_images(grey, EVERY, noise, seed) for seed in (0, 1, 2)])
    assert len({tuple(image.flatten().tolist()) for image in drawn}) == 33


def test_the_noise_is_of_the_size_that_was_asked_for() -> None:
    grey = ImageDataset(torch.full((200, 1, 8, 8), 100, dtype=torch.uint8), None)
    gaussian = noisy_images(grey, torch.arange(200), Noise("gaussian", 0.3)) - (100 / 127.5 - 1)
    deviation = 0.3 / gaussian.numel() ** 0.5
    assert abs(float(gaussian.mean())) < 5 * deviation
    assert float(gaussian.std()) == pytest.approx(0.3, abs=5 * deviation / 2**0.5)
    uniform = (noisy_images(grey, torch.arange(200), Noise("uniform")) + 1) * 128
    assert 100 <= uniform.min() < 100.01
    assert 100.99 < uniform.max() < 101
    for level in (0, 255):  # every level stays within its share of [-1, 1)
        flat = ImageDataset(torch.full((9, 1, 8, 8), level, dtype=torch.uint8), None)
        drawn = noisy_images(flat, torch.arange(9), Noise("uniform"))
        assert drawn.min() >= -1
        assert drawn.max() < 1


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_is_of_these_images_whatever_the_batch_size(noise: Noise) -> None:
    flow, data = make_flow(image_size=6, num_classes=3), some_data()
    noisy = by_hand(data, noise, seed=4)
    with torch.no_grad():
        want = float(flow.bits_per_dim(noisy, data.labels).mean())
        scores = torch.stack([flow.log_prob(noisy, torch.full((11,), label)) for label in range(3)])
    share = float((scores.argmax(dim=0) == data.labels).double().mean())
    for size in (1, 4, 64):
        assert bits_per_dim(flow, data, noise, seed=4, batch_size=size) == pytest.approx(want, abs=1e-5)
        assert bayes_accuracy(flow, data, noise, seed=4, batch_size=size) == pytest.approx(share)


def test_calibration_reads_the_images_in_any_batches() -> None:
    """A report of noisy images, read when they are asked for, is that of the images made beforehand."""

    class Read:
        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: Tensor) -> Tensor:
            return noisy_images(some_data(), index, NOISES[0], seed=3)

    flow = make_flow(image_size=6, num_classes=3)
    images, labels = noisy_images(some_data(), EVERY, NOISES[0], seed=3), some_data().labels
    read, given = (
        jf.calibrate(flow, source, labels, segments=2, traced=2, batch_size=4, progress=False)
        for source in (Read(), images)
    )
    assert read.to_json() == given.to_json()
