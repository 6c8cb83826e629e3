"""Score-based denoising of samples of a flow that was trained on noisy images."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.flows.image_flow import ImageFlow


def denoise(
    flow: ImageFlow,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None = None,
    rate: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "n c h w"]:
    """One step x + rate sigma^2 grad log p(x | label), sigma the flow's `noise_std` (Tweedie's formula at rate 1).

    Done in mini-batches of `batch_size`, which bounds the memory of the backward pass.

    **Raises** `ValueError` where `rate` is negative, or the flow records no Gaussian noise to remove.
    """
    check_rate(flow, rate)
    sigma = flow.config.noise_std
    steps = []
    for start in range(0, len(images), batch_size):
        with torch.inference_mode(False), torch.enable_grad():  # also where the caller has either off
            x = images[start : start + batch_size].detach().clone().requires_grad_()
            y = None if labels is None else labels[start : start + batch_size].clone()
            (score,) = torch.autograd.grad(flow.log_prob(x, y).sum(), x)
        steps.append(x.detach() + rate * sigma**2 * score)
    return torch.cat(steps)


def check_rate(flow: ImageFlow, rate: float) -> None:
    """**Raises** `ValueError` where `denoise` would."""
    if not 0 <= rate < math.inf:
        raise ValueError(f"denoise={rate}: give 0 (off) or a positive rate")
    if rate and not flow.config.noise_std:
        raise ValueError(f"denoise={rate}: this flow's noise_std is 0, there is no Gaussian noise to remove; give 0")
