"""Score-based denoising of samples of a flow that was trained on noisy images."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import DenoiseDtype, SamplingSettings
from jacobiflow.blocks.tokens import row_batches
from jacobiflow.errors import InputValueError
from jacobiflow.models.config import resolve_rate
from jacobiflow.models.contexts import Labels
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.memory import memory_needs
from jacobiflow.utils.checks import check_choice, check_count
from jacobiflow.utils.timing import has_bf16_products

_MAX_BACKWARD_BYTES = 4 << 30
"""Bytes that a backward pass may take beside the weights."""
_TOKENS_PER_THREAD = 1600
"""Tokens in one pass on a CPU, for each thread. The memory of the activations of more would not be reused."""


def denoise(
    flow: Flow,
    images: Float[Tensor, "n c h w"],
    labels: Labels | None = None,
    rate: float = 1.0,
    batch_size: int = 64,
    dtype: DenoiseDtype = None,
) -> Float[Tensor, "n c h w"]:
    """Takes one denoising step x + rate sigma^2 grad log p(x | label), where sigma is the flow's `noise_std`.

    At rate 1 it is Tweedie's formula. The density is that of the plain flow, without guidance. An image with a NaN or
    an infinity becomes NaN, with a warning; the others do not depend on it.

    At most `batch_size` images go through at a time, fewer if a backward pass would need more than 4 GiB, and a few on
    a CPU. With `dtype="bfloat16"` the networks compute in bfloat16. A CPU without such products is faster in float32,
    and computes in it, with a warning.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> samples = jf.sample(flow, 2, labels=[3, 7])
        >>> jf.denoise(flow, samples.images, [3, 7]).shape
        torch.Size([2, 1, 8, 8])
    """
    check_flow(flow)
    settings = resolve_denoising(flow, rate, dtype, "rate", "dtype")
    batch_size = check_count("batch_size", batch_size, maximum=2**31)
    flow.check_data(images, "images")
    context = flow.resolve_batch(images, labels)
    num_nonfinite = int((~torch.isfinite(images).all(dim=(1, 2, 3))).sum())
    if num_nonfinite:
        warnings.warn(f"{num_nonfinite} of {len(images)} images hold a NaN or an infinity: they are NaN", stacklevel=2)
    return denoise_checked(flow, images, context, settings, batch_size)


def resolve_denoising(
    flow: Flow, rate: float, dtype: DenoiseDtype, rate_name: str = "denoise", dtype_name: str = "denoise_dtype"
) -> SamplingSettings:
    """Returns the checked settings of a denoising step; names are those of the arguments in messages."""
    rate = resolve_rate(flow.config, rate, rate_name)
    check_choice(dtype_name, dtype, (None, "bfloat16"))
    if dtype and rate and flow.var.dtype == torch.float64:
        raise InputValueError("the flow is in float64; give None", argument=dtype_name, value=dtype)
    return SamplingSettings(denoise=rate, denoise_dtype=dtype if rate else None)


def denoise_checked(
    flow: Flow, images: Float[Tensor, "n c h w"], context: Context, settings: SamplingSettings, batch_size: int
) -> Float[Tensor, "n c h w"]:
    """Denoises as `denoise` does, without its checks and its warning."""
    images, dtype = images.detach(), denoising_dtype(settings, images.device)
    if dtype != settings.denoise_dtype:
        text = f"denoise_dtype={settings.denoise_dtype}: this processor has no such products, so float32 is used"
        warnings.warn(text, stacklevel=3)
    step = settings.denoise * flow.config.noise_std**2
    passes = row_batches(len(images), _pass_size(flow, len(images), batch_size))
    return torch.cat([images[rows] + step * score(flow, images[rows], context[rows], dtype) for rows in passes])


def denoising_dtype(settings: SamplingSettings, device: torch.device) -> DenoiseDtype:
    """Returns the dtype of the networks on a device: not bfloat16 on a CPU that would compute it more slowly."""
    return settings.denoise_dtype if device.type != "cpu" or has_bf16_products() else None


def _pass_size(flow: Flow, num: int, batch_size: int) -> int:
    """Returns the number of images of a pass, of `num` images in passes of about equal size."""
    limit = max(_MAX_BACKWARD_BYTES // (memory_needs(flow).gradient or _MAX_BACKWARD_BYTES), 1)
    if flow.var.device.type == "cpu":
        limit = min(limit, max(_TOKENS_PER_THREAD * torch.get_num_threads() // flow.config.num_tokens, 1))
    num_passes = -(-num // min(limit, batch_size))
    return -(-num // max(num_passes, 1))


def score(flow: Flow, images: Tensor, context: Context, dtype: DenoiseDtype) -> Tensor:
    """Returns grad log p(x | label); its networks run in `dtype`."""
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has either off
        x = images.clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16) if dtype else nullcontext():
            total = flow.log_prob(x, context.clone()).sum()
        (gradient,) = torch.autograd.grad(total, x)
    return gradient
