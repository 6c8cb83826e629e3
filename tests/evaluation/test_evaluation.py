"""Bits per dimension and Bayes' rule, against closed forms written in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from problems import make_flow
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import ImageDataset, Noise, bundled_fashion
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim

pytestmark = pytest.mark.usefixtures("one_thread")

FAINT = Noise("gaussian", 1e-7)
MEANS = torch.tensor([-0.8, 0.1, 0.7])


@torch.no_grad()
def constant_flow(scale: float = 0.0, shift: float = 0.0, variance: float = 1.0) -> jf.TarFlow:
    """One block whose log-scale and shift are constants, but for its first token of 2x2 pixels, which stays."""
    config = jf.TarFlowConfig(
        in_channels=1, image_size=6, patch_size=2, channels=8, num_blocks=1, layers_per_block=1, head_dim=4
    )
    flow = jf.TarFlow(config).double()
    flow.blocks[0].proj_out.bias[:4], flow.blocks[0].proj_out.bias[4:] = scale, shift
    flow.var.fill_(variance)
    return flow


@torch.no_grad()
def class_flow() -> jf.TarFlow:
    """A flow under which every pixel of class y, outside the first token, is of N(MEANS[y], 1)."""
    config = jf.TarFlowConfig(
        in_channels=1, image_size=6, patch_size=2, channels=4, num_blocks=1, layers_per_block=1, num_classes=3,
        nvp=False, head_dim=4,
    )  # fmt: skip
    flow = jf.TarFlow(config).double()
    block = flow.blocks[0]
    for parameter in block.parameters():
        parameter.zero_()  # attention and MLP add nothing to the residual stream
    assert block.class_embed is not None
    block.class_embed[:, 0, 0] = MEANS.double()
    block.proj_out.weight[:, 0] = 1
    return flow


def some_images(num: int = 11, size: int = 6) -> ImageDataset:
    data = bundled_fashion()
    assert data.labels is not None
    return ImageDataset(data.images[:num, :, 9 : 9 + size, 9 : 9 + size].contiguous(), data.labels[:num] % 3)


def pixels(data: ImageDataset) -> NDArray[np.float64]:
    return data.images.numpy().astype(np.float64)[:, 0] / 127.5 - 1


def first_token() -> NDArray[np.bool_]:
    mask = np.zeros((6, 6), dtype=bool)
    mask[:2, :2] = True
    return mask


def bits(nats_per_image: NDArray[np.float64]) -> float:
    """Bits per dimension of 8-bit pixels, of images of 36 pixels with these log-densities."""
    return float(-nats_per_image.mean() / 36 / np.log(2) + np.log2(128))


@pytest.mark.parametrize(
    ("scale", "shift", "variance"), [(0.0, 0.0, 1.0), (-0.7, 0.0, 1.0), (0.0, 0.4, 1.0), (0.3, -0.2, 2.5)]
)
def test_bits_of_a_flow_of_constants_are_the_closed_form(scale: float, shift: float, variance: float) -> None:
    data = some_images()
    x = pixels(data)
    # x = exp(scale) z + shift with z of N(0, variance), so x is of N(shift, exp(2 scale) variance).
    mean = np.where(first_token(), 0, shift)
    square = np.where(first_token(), 1, np.exp(2 * scale)) * variance
    nats = (-0.5 * (x - mean) ** 2 / square - 0.5 * np.log(2 * np.pi * square)).sum(axis=(1, 2))
    assert bits_per_dim(constant_flow(scale, shift, variance), data, FAINT) == pytest.approx(bits(nats), abs=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_bits_are_those_under_the_labels(labelled: bool) -> None:
    data = some_images()
    assert data.labels is not None
    # Without labels, the embedding is the mean over classes.
    means = MEANS.numpy()[data.labels] if labelled else np.full(len(data), MEANS.mean().item())
    mean = np.where(first_token(), 0, means[:, None, None])
    nats = (-0.5 * (pixels(data) - mean) ** 2 - 0.5 * np.log(2 * np.pi)).sum(axis=(1, 2))
    given = data if labelled else ImageDataset(data.images, None)
    assert bits_per_dim(class_flow(), given, FAINT) == pytest.approx(bits(nats), abs=1e-6)


def test_bits_of_dequantised_and_of_noisy_images() -> None:
    grey = ImageDataset(torch.full((600, 1, 6, 6), 200, dtype=torch.uint8), None)
    constant = 0.5 * math.log(2 * math.pi)

    # Under the identity flow a pixel costs E[x^2] / 2 nats and the constant; 600 x 36 pixels are drawn.
    centre, width = (200 + 0.5) / 128 - 1, 1 / 128
    uniform = (0.5 * (centre**2 + width**2 / 12) + constant) / math.log(2) + 7
    deviation = centre * width / math.sqrt(12) / math.sqrt(600 * 36) / math.log(2)
    assert bits_per_dim(constant_flow(), grey, Noise("uniform")) == pytest.approx(uniform, abs=5 * deviation)

    centre, std = 200 / 127.5 - 1, 0.3
    gaussian = (0.5 * (centre**2 + std**2) + constant) / math.log(2) + 7
    deviation = 0.5 * math.sqrt(4 * centre**2 * std**2 + 2 * std**4) / math.sqrt(600 * 36) / math.log(2)
    assert bits_per_dim(constant_flow(), grey, Noise("gaussian", std)) == pytest.approx(gaussian, abs=5 * deviation)


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


@pytest.mark.parametrize("noise", [Noise("gaussian", 0.4), Noise("uniform")])
def test_figures_do_not_depend_on_the_batch_size(noise: Noise) -> None:
    flow, data = make_flow(image_size=6, num_classes=3), some_images()  # 36 pixels: not a multiple of a SIMD width
    kept = data.images.clone()
    seen: dict[int, list[int]] = {1: [], 4: [], 64: []}
    figures = [bits_per_dim(flow, data, noise, seed=5, batch_size=size, on_batch=seen[size].append) for size in seen]
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-12)
    assert seen == {1: [1] * 11, 4: [4, 4, 3], 64: [11]}
    accuracies = {bayes_accuracy(flow, data, noise, seed=5, batch_size=size) for size in seen}
    assert len(accuracies) == 1
    assert torch.equal(data.images, kept)


def test_noise_follows_the_seed_and_differs_between_images() -> None:
    flow = make_flow(image_size=6)
    one, two = some_images(1), some_images(2)
    noise = Noise("gaussian", 0.4)
    twice = ImageDataset(one.images.expand(2, -1, -1, -1).contiguous(), None)
    assert bits_per_dim(flow, one, noise, seed=1) != bits_per_dim(flow, one, noise, seed=2)
    assert bits_per_dim(flow, one, noise, seed=1) != pytest.approx(bits_per_dim(flow, twice, noise, seed=1), rel=1e-9)
    assert bits_per_dim(flow, two, noise, seed=1) == bits_per_dim(flow, two, noise, seed=1)


@pytest.mark.parametrize(
    ("flow", "labels"),
    [(make_flow(image_size=6), torch.arange(11) % 3), (make_flow(image_size=6, num_classes=3), None)],
)
def test_class_accuracy_needs_classes_and_labels(flow: jf.TarFlow, labels: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"^class accuracy: needs a class-conditional flow and labelled images$"):
        bayes_accuracy(flow, ImageDataset(some_images().images, labels), FAINT)


def test_an_unconditional_flow_ignores_labels() -> None:
    data = some_images()
    unlabelled = ImageDataset(data.images, None)
    flow = make_flow(image_size=6)
    assert bits_per_dim(flow, data, FAINT) == bits_per_dim(flow, unlabelled, FAINT)
