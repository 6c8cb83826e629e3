"""Bits per dimension and Bayes' rule of noisy images, against the flow's own densities."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from jacobiflow.data import ImageDataset, Noise, load_images, noisy_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from jacobiflow.models import Flow
from tests.helpers.problems import make_flow

pytestmark = pytest.mark.usefixtures("one_thread")

FLOW = make_flow(image_size=6, num_classes=3)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    whole = load_images("fashion-512", 28, 1)
    assert whole.labels is not None
    return ImageDataset(whole.images[:11, :, 9:15, 9:15].contiguous(), whole.labels[:11] % 3)


def bits_of(flow: Flow, images: Tensor, labels: Tensor | None = None) -> float:
    """Mean bits of a pixel, whose 256 levels are [-1, 1]."""
    return float(7 - (flow.log_prob(images, labels) / math.log(2) / images[0].numel()).mean())


@pytest.mark.parametrize("noise", [Noise(0.4), Noise()])
@torch.no_grad()
def test_scores_are_of_the_noisy_images_whatever_the_batch_size(noise: Noise, data: ImageDataset) -> None:
    noisy = noisy_images(data, torch.arange(11), noise, seed=5).double()
    scores = torch.stack([FLOW.log_prob(noisy, torch.full((11,), label)) for label in range(3)])
    share = float((scores.argmax(dim=0) == data.labels).double().mean())
    for size in (4, 64):
        assert bits_per_dim(FLOW, data, noise, 5, size) == pytest.approx(bits_of(FLOW, noisy, data.labels))
        assert bayes_accuracy(FLOW, data, noise, 5, size) == pytest.approx(share)


@torch.no_grad()
def test_images_without_labels_have_bits_but_no_accuracy(data: ImageDataset) -> None:
    plain, noise = ImageDataset(data.images, None), Noise()
    noisy = noisy_images(plain, torch.arange(11), noise).double()
    assert bits_per_dim(FLOW, plain, noise) == pytest.approx(bits_of(FLOW, noisy))
    unconditional = make_flow(6)
    assert bits_per_dim(unconditional, data, noise) == pytest.approx(bits_of(unconditional, noisy))
    for flow, images in ((unconditional, data), (FLOW, plain)):
        with pytest.raises(ValueError, match=r"^class accuracy: needs a class-conditional flow and labelled images$"):
            bayes_accuracy(flow, images, noise)


@torch.no_grad()
def test_a_bfloat16_network_gets_images_in_float32(data: ImageDataset) -> None:
    flow, noise = copy.deepcopy(FLOW).bfloat16(), Noise(0.4)
    noisy = noisy_images(data, torch.arange(11), noise)
    assert bits_per_dim(flow, data, noise) == pytest.approx(bits_of(flow, noisy, data.labels))
