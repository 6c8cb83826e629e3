"""Bits per dimension and Bayes' rule, against closed forms; and in a bfloat16 network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import ImageDataset, Noise, load_images, noisy_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from tests.helpers.problems import make_flow

pytestmark = pytest.mark.usefixtures("one_thread")

FAINT = Noise("gaussian", 1e-7)
MEANS = torch.tensor([-0.8, 0.1, 0.7])


@torch.no_grad()
def class_flow(means: Tensor = MEANS) -> jf.TarFlow:
    """A flow under which every pixel of class y, outside the first token, is of N(means[y], 1)."""
    config = jf.TarFlowConfig(
        1, 6, 2, channels=4, num_blocks=1, layers_per_block=1, num_classes=3, nvp=False, head_dim=4
    )
    flow = jf.TarFlow(config).double()
    block = flow.blocks[0]
    for parameter in block.parameters():
        parameter.zero_()  # attention and MLP add nothing to the residual stream
    assert block.class_embed is not None
    block.class_embed[:, 0, 0] = means.double()
    block.proj_out.weight[:, 0] = 1
    return flow


def some_images(num: int = 11) -> ImageDataset:
    data = load_images("fashion-512", 28, 1)
    assert data.labels is not None
    return ImageDataset(data.images[:num, :, 9:15, 9:15].contiguous(), data.labels[:num] % 3)


@pytest.mark.parametrize("labelled", [True, False])
def test_bits_are_those_under_the_labels(labelled: bool) -> None:
    data = some_images()
    assert data.labels is not None
    # Without labels, the embedding is the mean over classes.
    means = MEANS.double()[data.labels] if labelled else MEANS.double().mean().expand(len(data))
    mean = means.view(-1, 1, 1, 1).repeat(1, 1, 6, 6)
    mean[:, :, :2, :2] = 0
    nats = (-0.5 * (data.images.double() / 127.5 - 1 - mean) ** 2 - 0.5 * math.log(2 * math.pi)).mean()
    given = data if labelled else ImageDataset(data.images, None)
    assert bits_per_dim(class_flow(), given, FAINT) == pytest.approx(float(-nats / math.log(2) + 7), abs=1e-6)


def test_bayes_accuracy_is_that_of_the_nearest_mean() -> None:
    grey = torch.tensor([-0.9, -0.5, -0.3, 0.0, 0.3, 0.45, 0.9, 1.0])
    nearest = [0, 0, 1, 1, 1, 2, 2, 2]
    images = ((grey + 1) * 127.5).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
    images[:, :, :2, :2] = 255  # says nothing of the class
    wrong = [1, 0, 1, 1, 2, 2, 2, 0]
    for labels, share in ((nearest, 1.0), (wrong, 5 / 8)):
        data = ImageDataset(images, torch.tensor(labels))
        assert bayes_accuracy(class_flow(), data, Noise("gaussian", 0.01)) == share
        assert bayes_accuracy(class_flow(), data, Noise("uniform"), batch_size=3) == share


class Calls(list[tuple[int, int, str]]):
    """A progress that records its calls."""

    def __call__(self, done: int, total: int, what: str) -> None:
        self.append((done, total, what))


@pytest.mark.parametrize("noise", [Noise("gaussian", 0.4), Noise("uniform")])
def test_figures_are_of_the_noisy_images_whatever_the_batch_size(noise: Noise) -> None:
    flow, data = make_flow(image_size=6, num_classes=3), some_images()
    noisy = noisy_images(data, torch.arange(11), noise, seed=5).double()
    with torch.no_grad():
        want = float(flow.bits_per_dim(noisy, data.labels).mean())
        scores = torch.stack([flow.log_prob(noisy, torch.full((11,), label)) for label in range(3)])
    share = float((scores.argmax(dim=0) == data.labels).double().mean())
    for size, steps in ((4, [4, 8, 11]), (64, [11])):
        calls = Calls()
        assert bits_per_dim(flow, data, noise, 5, size, calls) == pytest.approx(want, rel=1e-9)
        assert bayes_accuracy(flow, data, noise, 5, size, calls) == pytest.approx(share)
        assert calls == [(done, 11, what) for what in ("bits per dimension", "class accuracy") for done in steps]
    for other, given in ((make_flow(6), data), (flow, ImageDataset(data.images, None))):
        with pytest.raises(ValueError, match=r"^class accuracy: needs a class-conditional flow and labelled images$"):
            bayes_accuracy(other, given, noise)


def test_a_bfloat16_network_keeps_images_and_latents_in_float32() -> None:
    """A state of bfloat16 would round log-densities near 500 nats to multiples of 4, and lose the second class."""
    whole, noise = load_images("fashion-512", 28, 1), Noise("gaussian", 0.1)
    assert whole.labels is not None
    data = ImageDataset(whole.images[[91, 81]], whole.labels[[91, 81]])  # by float32, 4 nats ahead of all other classes
    noisy = noisy_images(data, torch.arange(2), noise).repeat(2, 1, 1, 1)
    low, exact = (jf.load("fashion-p2", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        found, want = (flow.log_prob(noisy, torch.tensor([3, 3, 0, 0])) for flow in (low, exact))
    assert found.dtype == torch.float32
    assert (found - want).abs().mean() < 1.2
    assert bayes_accuracy(low, data, noise) == 1
