"""Score-based denoising of samples of a flow that was trained on noisy images."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_count, check_number
from jacobiflow.flows.image_flow import ImageFlow, check_flow

_MOST = 2**31  # images at a time


def denoise(
    flow: ImageFlow,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None = None,
    rate: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "n c h w"]:
    """One step x + rate sigma^2 grad log p(x | label), sigma the flow's `noise_std` (Tweedie's formula at rate 1).

    Done in mini-batches of `batch_size`, which bounds the memory of the backward pass. An image that holds a NaN or an
    infinity becomes NaN, with a warning; the others do not depend on it.

    **Raises** `ValueError` where `rate` is negative, the flow records no Gaussian noise to remove, or images or labels
    do not fit the flow; `TypeError` for other kinds of them.
    """
    check_flow(flow)
    check_rate(flow, rate, "rate")
    check_count("batch_size", batch_size, most=_MOST)
    flow.check_batch(images, labels)
    lost = int((~torch.isfinite(images).all(dim=(1, 2, 3))).sum())
    if lost:
        warnings.warn(f"{lost} of {len(images)} images hold a NaN or an infinity: they are NaN", stacklevel=2)
    return denoised(flow, images, labels, rate, batch_size)


def denoised(
    flow: ImageFlow, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None, rate: float, batch_size: int
) -> Float[Tensor, "n c h w"]:
    """`denoise`, where its arguments are known to fit and a warning was given."""
    sigma = flow.config.noise_std
    steps = []
    for start in range(0, len(images), batch_size):
        with torch.inference_mode(False), torch.enable_grad():  # also where the caller has either off
            x = images[start : start + batch_size].detach().clone().requires_grad_()
            y = None if labels is None else labels[start : start + batch_size].clone()
            (score,) = torch.autograd.grad(flow.log_prob(x, y).sum(), x)
        steps.append(x.detach() + rate * sigma**2 * score)
    return torch.cat(steps)


def check_rate(flow: ImageFlow, rate: float, name: str = "denoise") -> None:
    """**Raises** what `denoise` would for the rate, which the caller knows by `name`."""
    check_number(name, rate, give="0 (off) or a positive rate")
    if rate and not flow.config.noise_std:
        raise ValueError(f"{name}={rate}: this flow's noise_std is 0, there is no Gaussian noise to remove; give 0")
