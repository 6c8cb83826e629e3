"""Likelihood of test images: bits per dimension, and class accuracy by Bayes' rule."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.data import ImageDataset, Noise, noisy_images
from jacobiflow.errors import InputValueError
from jacobiflow.models.flow import Flow


def bits_per_dim(flow: Flow, data: ImageDataset, noise: Noise, seed: int = 0, batch_size: int = 64) -> float:
    """Computes the mean bits per dimension of images, in units of 8-bit pixels: -log2 p(x) / D + log2(128).

    Args:
        data: Test images. Labels are used if the flow has classes.
        noise: With `Noise()` the images are uniformly dequantised, and the value bounds the code length of the 8-bit
            images. With `Noise(std)` it is that of the *noisy* images, which a flow that was trained on such images
            models; report it as such.
        batch_size: Images in the network at a time.

    Example:
        >>> from jacobiflow.data import digits
        >>> data = digits()
        >>> few = ImageDataset(data.images[:16], data.labels[:16])
        >>> round(bits_per_dim(jf.load("digits-p1"), few, Noise(0.1)), 1)
        6.8
    """
    batches = torch.arange(len(data), device="cpu").split(batch_size)
    return sum(total_bits_per_dim(flow, data, noise, seed, index) for index in batches) / len(data)


@torch.no_grad()
def total_bits_per_dim(flow: Flow, data: ImageDataset, noise: Noise, seed: int, index: Int[Tensor, " b"]) -> float:
    """Computes the sum of the bits per dimension of the images at `index`, see `bits_per_dim`."""
    images, labels = _noisy_batch(flow, data, noise, seed, index)
    nats = -flow.log_prob(images, labels) / images[0].numel()
    return float((nats / math.log(2) + 7).sum())  # A level of a pixel is 2 / 256 wide: log2(128) = 7


def bayes_accuracy(flow: Flow, data: ImageDataset, noise: Noise, seed: int = 0, batch_size: int = 64) -> float:
    """Computes the share of images whose label is the class y with the largest log p(x | y).

    Classes are taken to be equally likely. An image has the same noise for all classes, best that of the training.
    """
    batches = torch.arange(len(data), device="cpu").split(batch_size)
    return sum(count_correct_classes(flow, data, noise, seed, index) for index in batches) / len(data)


@torch.no_grad()
def count_correct_classes(flow: Flow, data: ImageDataset, noise: Noise, seed: int, index: Int[Tensor, " b"]) -> int:
    """Counts the images at `index` whose label is the likeliest class, see `bayes_accuracy`."""
    if not flow.config.num_classes or data.labels is None:
        raise InputValueError("class accuracy: needs a class-conditional flow and labelled images")
    images, labels = _noisy_batch(flow, data, noise, seed, index)
    classes = range(flow.config.num_classes)
    scores = [flow.log_prob(images, torch.full((len(images),), y, device=images.device)) for y in classes]
    return int(torch.eq(torch.stack(scores).argmax(dim=0), labels).sum())  # type: ignore[arg-type]


def _noisy_batch(
    flow: Flow, data: ImageDataset, noise: Noise, seed: int, index: Int[Tensor, " b"]
) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"] | None]:
    """Returns images with noise, and labels if the flow takes any."""
    device = flow.var.device
    labels = None if data.labels is None or not flow.config.num_classes else data.labels[index].to(device)
    return noisy_images(data, index, noise, seed).to(device, flow.state_dtype), labels
