"""Samples of a flow: latents through its blocks, each solved by a strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.options import CertifyMode
from jacobiflow.models.contexts import ContextLike, Labels
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner import Strategy
from jacobiflow.sampling.request import SamplingRequest, Settings
from jacobiflow.sampling.result import Samples
from jacobiflow.utils.checks import check_finite, check_flag, check_floating, check_kind, format_value
from jacobiflow.utils.deprecation import renamed_arguments
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.warn import warn_caller


@renamed_arguments(return_trace="return_intermediates")
def sample(
    flow: Flow,
    num: int | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    context: ContextLike | None = None,
    latents: Float[Tensor, "n t d"] | None = None,
    settings: Settings = "recommended",
    strategy: str | Path | Strategy = "auto",
    tolerance: float | None = None,
    certify: CertifyMode = True,
    sensitivity: bool = False,
    batch_size: int | None = None,
    log_prob: bool | None = None,
    return_intermediates: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """Draws samples x = f^-1(z): the inverse of every block, last first, each to its tolerance.

    Args:
        flow: The model, or a view of it under guidance (`flow.guided(...)`), which keeps its own; its device is used.
        num: The number of samples; or give `latents`.
        labels: Classes by number or by name, or one class for all. A label below 0, or `None`, takes the unconditional
            row.
        context: In place of labels: numbers (N, K) for each sample or (N, T, K) for each token, or prompts.
        seed: Fixes the latent of sample i, whatever the batch size.
        latents: Standard normal, before the prior's scale.
        settings: "recommended" takes the guidance and denoising that the model recommends (guidance only with labels
            or prompts), `None` neither, and `SamplingSettings` sets both.
        strategy: A name (see `Strategy.parse`), a `Strategy`, or the path of its JSON file.
        tolerance: The largest |g(x) - x| in any block; by default the strategy's own, which is 1e-3 for most names.
        certify: Measures the residual of every sample in every block, one parallel pass each, and solves again each
            sample above the tolerance. Blocks that are solved token by token need no such pass; "always" measures them
            too. Without certificates a token is final when its last sweep changed it by at most the tolerance; its
            residual is then not known, and can be larger.
        sensitivity: Measures how much rounding changes each sample, by a second solve from latents that are changed in
            their last bits. Exact samples that move by more than 2.5e-4 are solved in float64, too. The samples
            themselves stay the same. The second solve takes as long as the first.
        batch_size: Samples in the network at a time, all by default.
        log_prob: Whether to return densities, by default if the flow is over tokens. They cost nothing where native
            code solves every block, else an encoding pass. Guided or denoised samples have none.
        return_intermediates: Returns x after every block, too.
        progress: Is called after each block.

    Returns:
        `Samples`. A sample that misses its tolerance or overflows is solved again token by token, and counted. If its
        exact inverse overflows, too, it is NaN. A warning says if samples are not finite, above the tolerance,
        uncertified, or sensitive to rounding.

    Example:
        >>> samples = jf.sample(jf.load("digits-p1"), 4, labels=[0, 1, 2, 3], strategy="jacobi")
        >>> samples.images.shape, bool((samples.residual <= 1e-3).all())
        (torch.Size([4, 1, 8, 8]), True)
    """
    check_flow(flow)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    if num is not None and latents is None:
        latents = draw_latents(num, flow.config.num_tokens, flow.config.token_dim, seed)
    elif num is not None or latents is None:
        raise InputValueError("give either num or latents")
    _check_latents("latents", latents, flow)
    if latents.requires_grad and torch.is_grad_enabled():
        raise InputValueError(
            f"latents={format_value(latents)} requires a gradient: give latents.detach(), or use decode"
        )
    request = SamplingRequest.resolve(
        flow, len(latents), labels, context=context, settings=settings, strategy=strategy, tolerance=tolerance,
        certify=certify, sensitivity=sensitivity, batch_size=batch_size, log_prob=log_prob,
        return_intermediates=return_intermediates,
    )  # fmt: skip
    with torch.no_grad():
        samples = request.run(latents, progress)
    if samples.outcome.has_shortfall:
        warn_caller(str(samples.outcome))
    return samples


@overload
def decode(
    flow: Flow, z: Tensor, context: ContextLike | None = ..., *, strategy: str | Path | Strategy = ...,
    tolerance: float | None = ..., certify: CertifyMode = ..., log_prob: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def decode(
    flow: Flow, z: Tensor, context: ContextLike | None = ..., *, strategy: str | Path | Strategy = ...,
    tolerance: float | None = ..., certify: CertifyMode = ..., log_prob: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def decode(
    flow: Flow,
    z: Float[Tensor, "n t d"],
    context: ContextLike | None = None,
    *,
    strategy: str | Path | Strategy = "auto",
    tolerance: float | None = None,
    certify: CertifyMode = True,
    log_prob: bool = False,
) -> Any:
    """Returns the x with latents `z`, the inverse of `flow.encode`; with `log_prob` also its log-density (N,) in nats.

    It is `sample` without its record and without denoising, and it is differentiable: in z, in a context of numbers and
    in the parameters of the flow, by the implicit function theorem. Samples that are not certified cause a warning.
    For a view under guidance x is the inverse of the guided blocks, whose density is not that of `encode`.

    Example:
        >>> flow, z = jf.load("digits-p1"), torch.zeros(1, 64, 1)
        >>> images, log_prob = jf.decode(flow, z, [7], log_prob=True)
        >>> torch.allclose(flow.log_prob(images, [7]), log_prob, atol=1e-2)
        True
    """
    check_flow(flow)
    check_flag("log_prob", log_prob)
    _check_latents("z", z, flow)
    request = SamplingRequest.resolve(
        flow, len(z), context=context, settings=None, strategy=strategy, tolerance=tolerance, certify=certify,
        log_prob=log_prob,
    )  # fmt: skip
    samples = request.run(z)
    if samples.outcome.has_shortfall:
        warn_caller(str(samples.outcome))
    return (samples.x, samples.log_prob) if log_prob else samples.x


def _check_latents(name: str, latents: Tensor, flow: Flow) -> None:
    check_floating(name, latents, ("N", flow.config.num_tokens, flow.config.token_dim))
    check_finite(name, latents)
