"""Likelihood on held-out images: bits per dimension, and class accuracy by Bayes' rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.data import ImageDataset
from jacobiflow.data.noise import Noise, noisy_images
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow, state_dtype


@torch.no_grad()
def bits_per_dim(
    flow: ImageFlow,
    data: ImageDataset,
    noise: Noise,
    seed: int = 0,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Mean bits per dimension of `data` under its labels, in units of 8-bit pixels: -log2 p(x) / D + log2(128).

    With `Noise("uniform")` the images are uniformly dequantised, and the figure bounds the code length of the 8-bit
    data. With `Noise("gaussian", std)` it is that of the *noisy* images, which a flow trained on such is a model of;
    report it as such. The noise of image i depends on `seed` and i only. `on_batch` is called with the number of
    images of each batch.
    """
    total = 0.0
    for start in range(0, len(data), batch_size):
        noisy, labels = _noisy_batch(flow, data, noise, seed, start, batch_size)
        total += float(flow.bits_per_dim(noisy, labels).sum())
        if on_batch is not None:
            on_batch(len(noisy))
    return total / len(data)


@torch.no_grad()
def bayes_accuracy(
    flow: ImageFlow,
    data: ImageDataset,
    noise: Noise,
    seed: int = 0,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Share of `data` whose label is the class y with the largest log p(x | y), classes being equally likely.

    Images get the noise that the flow was trained with, once for all classes.

    **Raises** `ValueError` where the flow has no classes or `data` no labels.
    """
    if not flow.config.num_classes or data.labels is None:
        raise InputValueError("class accuracy: needs a class-conditional flow and labelled images")
    correct = 0
    for start in range(0, len(data), batch_size):
        noisy, _ = _noisy_batch(flow, data, noise, seed, start, batch_size)
        scores = [
            flow.log_prob(noisy, torch.full((len(noisy),), y, device=noisy.device))
            for y in range(flow.config.num_classes)
        ]
        correct += int(torch.eq(torch.stack(scores).argmax(dim=0).cpu(), data.labels[start : start + batch_size]).sum())
        if on_batch is not None:
            on_batch(len(noisy))
    return correct / len(data)


def _noisy_batch(
    flow: ImageFlow, data: ImageDataset, noise: Noise, seed: int, start: int, batch_size: int
) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"] | None]:
    """Images with their noise, in the dtype of the state, and labels where the flow takes any, on its device."""
    index = torch.arange(start, min(start + batch_size, len(data)))
    device = flow.var.device
    labels = None if data.labels is None or not flow.config.num_classes else data.labels[index].to(device)
    return noisy_images(data, index, noise, seed).to(device, state_dtype(flow)), labels
