"""Score-based denoising of samples of a flow that was trained on noisy images."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jacobiflow.blocks.context import Context
from jacobiflow.models.config import resolve_rate
from jacobiflow.models.contexts import Labels
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.memory import memory_needs
from jacobiflow.utils.checks import check_count

_MAX_BACKWARD_BYTES = 4 << 30
"""Bytes that a backward pass may take beside the weights."""
_ACTIVATIONS_OF_BACKWARD = 8
"""The most bytes that the backward pass of a block keeps, in multiples of those that its solution takes."""


def denoise(
    flow: Flow,
    images: Float[Tensor, "n c h w"],
    labels: Labels | None = None,
    rate: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "n c h w"]:
    """Takes one denoising step x + rate sigma^2 grad log p(x | label), where sigma is the flow's `noise_std`.

    At rate 1 it is Tweedie's formula. The density is that of the plain flow, without guidance. An image with a NaN or
    an infinity becomes NaN, with a warning; the others do not depend on it.

    At most `batch_size` images go through at a time, fewer if a backward pass would need more than 4 GiB.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> samples = jf.sample(flow, 2, labels=[3, 7])
        >>> jf.denoise(flow, samples.images, [3, 7]).shape
        torch.Size([2, 1, 8, 8])
    """
    check_flow(flow)
    rate = resolve_rate(flow.config, rate, "rate")
    batch_size = check_count("batch_size", batch_size, maximum=2**31)
    flow.check_data(images, "images")
    context = flow.resolve_batch(images, labels)
    num_nonfinite = int((~torch.isfinite(images).all(dim=(1, 2, 3))).sum())
    if num_nonfinite:
        warnings.warn(f"{num_nonfinite} of {len(images)} images hold a NaN or an infinity: they are NaN", stacklevel=2)
    return denoise_checked(flow, images, context, rate, batch_size)


def denoise_checked(
    flow: Flow, images: Float[Tensor, "n c h w"], context: Context, rate: float, batch_size: int
) -> Float[Tensor, "n c h w"]:
    """Denoises as `denoise` does, without its checks and its warning."""
    images, steps = images.detach(), []
    start, size = 0, 1  # the first image alone shows how much memory one takes
    while start < len(images):
        rows = slice(start, start + size)
        score, used = _score(flow, images[rows], context[rows])
        steps.append(images[rows] + rate * flow.config.noise_std**2 * score)
        start += size
        size = min(batch_size, max(_MAX_BACKWARD_BYTES * size // max(used, 1), 1))
    return torch.cat(steps)


def _score(flow: Flow, images: Tensor, context: Context) -> tuple[Tensor, int]:
    """grad log p(x | label), and the bytes beside the weights that its backward pass needed."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has either off
        x = images.detach().clone().requires_grad_()
        with saved_tensors_hooks(note, lambda tensor: tensor):
            total = flow.log_prob(x, context.clone()).sum()
        (score,) = torch.autograd.grad(total, x)
    weights = {tensor.untyped_storage()._cdata for tensor in flow.state_dict(keep_vars=True).values()}
    used = sum(size for storage, size in sizes.items() if storage not in weights)
    if flow.block_loader is not None:  # The backward pass computes a block's activations again, which the hooks miss.
        used += _ACTIVATIONS_OF_BACKWARD * (memory_needs(flow).of_batch(len(images)) or _MAX_BACKWARD_BYTES)
    return score, used
