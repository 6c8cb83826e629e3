"""Score-based denoising of samples of a flow that was trained on noisy images."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jacobiflow.checks import check_count, check_number
from jacobiflow.flows.image_flow import ImageFlow, check_flow

_MOST = 2**31  # images at a time
_MEMORY = 4 << 30  # bytes that a backward pass may need beside the weights


def denoise(
    flow: ImageFlow,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None = None,
    rate: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "n c h w"]:
    """One step x + rate sigma^2 grad log p(x | label), sigma the flow's `noise_std` (Tweedie's formula at rate 1).

    Done in mini-batches of at most `batch_size`, and of fewer where backward passes would need more than 4 GiB. An
    image that holds a NaN or an
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
    sigma, steps = flow.config.noise_std, []
    start, size = 0, 1  # the first image alone: it says how much memory an image takes
    while start < len(images):
        rows = slice(start, start + size)
        with torch.inference_mode(False), torch.enable_grad():  # also where the caller has either off
            x = images[rows].detach().clone().requires_grad_()
            kept: dict[int, int] = {}
            with saved_tensors_hooks(partial(_note, kept), lambda tensor: tensor):
                total = flow.log_prob(x, None if labels is None else labels[rows].clone()).sum()
            (score,) = torch.autograd.grad(total, x)
        steps.append(x.detach() + rate * sigma**2 * score)
        if start == 0:
            weights = {parameter.untyped_storage()._cdata for parameter in flow.state_dict(keep_vars=True).values()}
            needed = sum(size for storage, size in kept.items() if storage not in weights)
            batch_size = min(batch_size, _MEMORY // max(needed, 1) or 1)
        start, size = start + size, batch_size
    return torch.cat(steps)


def _note(kept: dict[int, int], tensor: Tensor) -> Tensor:
    """Note the memory of a tensor that the backward pass needs."""
    storage = tensor.untyped_storage()
    kept[storage._cdata] = storage.nbytes()
    return tensor


def check_rate(flow: ImageFlow, rate: float, name: str = "denoise") -> None:
    """**Raises** what `denoise` would for the rate, which the caller knows by `name`."""
    check_number(name, rate, give="0 (off) or a positive rate")
    if rate and not flow.config.noise_std:
        raise ValueError(f"{name}={rate}: this flow's noise_std is 0, there is no Gaussian noise to remove; give 0")
