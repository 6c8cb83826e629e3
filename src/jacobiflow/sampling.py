"""Samples images: latents through the blocks of a flow, each solved by a strategy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.checks import check_count, check_finite, check_flag, check_floating, check_kind, check_seed, short
from jacobiflow.denoising import check_rate, denoised
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow, check_flow, state_dtype
from jacobiflow.flows.labels import Labels
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import MOST_SAMPLES, draw_latents
from jacobiflow.outcome import Outcome
from jacobiflow.progress import Progress
from jacobiflow.solvers import Certificate, Solution, Status, check_certificate, solve_certified
from jacobiflow.strategy import Strategy, choose

_GROUP = 16  # batches that go through a block before the next block: a progress bar's step, and bounded memory


@dataclass(frozen=True)
class BlockStats:
    """The cost of one block and how its solves ended, over all samples of a run; see `Solution`.

    Under guidance a network call evaluates two rows per sample.
    """

    sweeps: int
    network_calls: int
    token_evaluations: int
    seconds: float
    residual: Float[Tensor, " n"]
    status: Int[Tensor, " n"]
    exact: Bool[Tensor, " n"]
    resolved_sequentially: Bool[Tensor, " n"]

    @classmethod
    def join(cls, solutions: Sequence[Solution]) -> BlockStats:
        """Returns the sums over solutions of different samples, and the entries of all samples."""
        return cls(
            sweeps=sum(solution.sweeps for solution in solutions),
            network_calls=sum(solution.network_calls for solution in solutions),
            token_evaluations=sum(solution.token_evaluations for solution in solutions),
            seconds=sum(solution.seconds for solution in solutions),
            residual=torch.cat([solution.residual for solution in solutions]),
            status=torch.cat([solution.status for solution in solutions]),
            exact=torch.cat([solution.exact for solution in solutions]),
            resolved_sequentially=torch.cat([solution.resolved_sequentially for solution in solutions]),
        )


@dataclass(frozen=True)
class Samples:
    """Images, their certificates and their cost.

    Attributes:
        images: (N, C, H, W), nominally in [-1, 1], not clipped; NaN if the exact inverse overflows.
        latents: (N, T, C), standard normal, before the prior's scale.
        labels: (N,) or `None`.
        stats: A `BlockStats` for each block, in encoding order.
        certificate: Per sample (N,) the largest |g(x) - x| over tokens, channels and blocks, guidance included, before
            denoising; `None` without certificates. A block that was solved token by token is exact by construction and
            counts as 0, unless it was measured too.
        tolerance: The residual that every block was held to; `None` if the strategy has blocks that stop after a fixed
            number of sweeps. Their samples are not certified, see `outcome`.
        trace: The noise, the image after each block in sampling order, and the denoised image; `None` without a trace.
        seconds: Wall-clock time of solving all blocks.
        denoise_seconds: Wall-clock time of denoising.

    Example:
        >>> samples = jf.sample(jf.load("digits-p1"), 3, labels=[1, 2, 3])
        >>> print(samples.outcome)
        3 samples: 3 exact, since every block was solved token by token
    """

    images: Float[Tensor, "n c h w"]
    latents: Float[Tensor, "n t d"]
    labels: Int[Tensor, " n"] | None
    stats: tuple[BlockStats, ...]
    certificate: Float[Tensor, " n"] | None
    tolerance: float | None
    trace: tuple[Float[Tensor, "n c h w"], ...] | None
    seconds: float
    denoise_seconds: float

    @property
    def network_calls(self) -> int:
        """The network calls of all blocks."""
        return sum(block.network_calls for block in self.stats)

    @property
    def token_evaluations(self) -> int:
        """The token evaluations of all blocks."""
        return sum(block.token_evaluations for block in self.stats)

    @property
    def resolved_sequentially(self) -> int:
        """The number of samples that some block solved again token by token."""
        return int(torch.stack([block.resolved_sequentially for block in self.stats]).any(dim=0).sum())

    @property
    def exact(self) -> Bool[Tensor, " n"]:
        """True for samples that are exact by construction: every block was solved token by token."""
        return torch.stack([block.exact for block in self.stats]).all(dim=0)

    @property
    def status(self) -> Int[Tensor, " n"]:
        """The worst `Status` of each sample over its blocks."""
        return torch.stack([block.status for block in self.stats]).amax(dim=0)

    @property
    def outcome(self) -> Outcome:
        """Counts of certified samples and of the others; `print(out.outcome)` gives them in a sentence."""
        status, certificate = self.status, self.certificate
        return Outcome(
            num=len(status),
            tolerance=self.tolerance,
            residual=None if certificate is None else float(certificate.nan_to_num(posinf=0.0).max()),
            exact=bool(self.exact.all()),
            resolved=self.resolved_sequentially,
            above=int((status == Status.ROUNDING).sum()),
            lost=int((status == Status.NONFINITE).sum()),
        )


def sample(
    flow: ImageFlow,
    num: int | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    latents: Float[Tensor, "n t d"] | None = None,
    strategy: str | Path | Strategy = "auto",
    denoise: float = 0.0,
    tolerance: float | None = None,
    certify: Certificate = True,
    batch_size: int | None = None,
    return_trace: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """Samples images x = f^-1(z): the inverse of every block, last first, each to its tolerance.

    Args:
        flow: The model, or a view of it under guidance (`flow.guided(...)`); its device is used.
        num: The number of samples; or give `latents`.
        labels: Classes, or one class for all. A label below 0, or `None`, takes the unconditional row.
        seed: Fixes the latent of sample i, whatever the batch size.
        latents: (N, T, C), standard normal, before the prior's scale.
        strategy: A name (see `jacobiflow.strategy.choose`), a `Strategy`, or the path of its JSON file.
        denoise: Rate of one denoising step; 0 is off.
        tolerance: The largest |g(x) - x| in any block that stops on a tolerance; refused if none does. `None`: 1e-3 for
            a named strategy, its own for any other.
        certify: Measures the residual of every sample in every block, one parallel pass each, and solves again each
            sample above the tolerance. Blocks that are solved token by token need no such pass; "always" measures them
            too. Without certificates a token is final when its last sweep changed it by at most the tolerance; its
            residual is then not known, and can be larger.
        batch_size: Samples in the network at a time, all by default. If samples have fronts of their own (see
            `jacobiflow.solve`), the next ones take the places of those that have finished.
        return_trace: Returns the image after every block, too.
        progress: Is called after each block.

    Returns:
        `Samples`. A sample that missed its tolerance or overflowed was solved again token by token and is counted; none
        is drawn anew. One that overflows in the exact inverse too is NaN. A warning says so, as it does if samples are
        above the tolerance or if the strategy certifies none.

    Example:
        >>> samples = jf.sample(jf.load("digits-p1"), 4, labels=[0, 1, 2, 3], strategy="jacobi")
        >>> samples.images.shape, bool((samples.certificate <= 1e-3).all())
        (torch.Size([4, 1, 8, 8]), True)
    """
    batch_size, denoise = check_settings(flow, batch_size, denoise, certify)
    check_flag("return_trace", return_trace)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    latents, labels = _checked_latents(flow, num, latents, labels, seed)
    warn_if_guidance_is_idle(flow, labels)
    slots = min(batch_size or len(latents), len(latents))
    plan = choose(flow, strategy, slots, tolerance=tolerance)
    result = draw(
        flow, plan, latents, labels, denoise=denoise, certify=certify, batch_size=batch_size,
        return_trace=return_trace, progress=progress,
    )  # fmt: skip
    if result.outcome.has_shortfall:
        warnings.warn(str(result.outcome), stacklevel=2)
    return result


def draw(
    flow: ImageFlow, plan: Strategy, latents: Float[Tensor, "n t d"], labels: Int[Tensor, " n"] | None = None, *,
    denoise: float = 0.0, certify: Certificate = True,
    batch_size: int | None = None, return_trace: bool = False, progress: Progress | None = None,
) -> Samples:  # fmt: skip
    """Solves all blocks at the latents by a plan, as `sample` does, without its checks and its warning."""
    latents = latents.to(flow.var.device, state_dtype(flow))
    labels = None if labels is None else labels.to(flow.var.device)
    slots, num_blocks = batch_size or len(latents), len(flow.blocks)
    starts = range(0, len(latents), slots * _GROUP)
    num_solved = 0

    def note_block() -> None:
        nonlocal num_solved
        num_solved += 1
        if progress is not None:
            progress(num_solved, len(starts) * num_blocks, "sampling")

    started = time.perf_counter()
    solved = []
    for start in starts:
        rows = slice(start, start + slots * _GROUP)
        some, classes = latents[rows], None if labels is None else labels[rows]
        solved.append(_solve_group(flow, plan, certify, slots, return_trace, note_block, some, classes))
    seconds = time.perf_counter() - started

    images = torch.cat([group.images for group in solved])
    stats = tuple(BlockStats.join([group.solutions[i] for group in solved]) for i in range(num_blocks))
    trace = [torch.cat(steps) for steps in zip(*(group.trace for group in solved), strict=True)]
    started = time.perf_counter()
    if denoise:
        images = denoised(flow, images, labels, denoise, batch_size or 64)
        trace.append(images)
    return Samples(
        images=images,
        latents=latents,
        labels=labels,
        stats=stats,
        certificate=torch.stack([block.residual for block in stats]).amax(dim=0) if certify else None,
        tolerance=plan.residual_bound(flow.config.num_tokens),
        trace=tuple(trace) if return_trace else None,
        seconds=seconds,
        denoise_seconds=time.perf_counter() - started,
    )


def decode(
    flow: ImageFlow,
    z: Float[Tensor, "n t d"],
    labels: Labels | None = None,
    *,
    strategy: str | Path | Strategy = "auto",
    tolerance: float | None = None,
    certify: Certificate = True,
) -> Samples:
    """Returns the images with latents `z`, without denoising: the inverse of `flow.encode`. See `sample`.

    For a view under guidance it is the inverse of the guided blocks. `encode` stays that of the plain flow.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> samples = jf.decode(flow, torch.zeros(1, 64, 1), [7], strategy="sequential")
        >>> bool(flow.encode(samples.images, [7])[0].abs().max() < 1e-2)
        True
    """
    check_settings(flow, None, 0.0, certify)
    check_floating("z", z, ("N", flow.config.num_tokens, flow.config.token_channels))
    z, labels = _checked_latents(flow, None, z, labels, seed=0, name="z")
    result = draw(flow, choose(flow, strategy, len(z), tolerance=tolerance), z, labels, certify=certify)
    if result.outcome.has_shortfall:
        warnings.warn(str(result.outcome), stacklevel=2)
    return result


@dataclass(frozen=True)
class _Group:
    images: Tensor
    solutions: list[Solution]
    trace: list[Tensor]


def _solve_group(
    flow: ImageFlow, plan: Strategy, certify: Certificate, slots: int, return_trace: bool,
    note_block: Callable[[], None], latents: Tensor, labels: Tensor | None,
) -> _Group:  # fmt: skip
    x, blocks = prior_tokens(flow, latents), flow.inverse_blocks
    lost = ~torch.isfinite(x).all(dim=(1, 2))
    solutions: dict[int, Solution] = {}
    trace = [flow.to_images(x)] if return_trace else []

    def solve_block(i: int, z: Tensor) -> Tensor:
        nonlocal lost
        # A sample lost in an earlier block goes on as zeros, so that the rest of its group can be solved.
        z = z.masked_fill(lost.view(-1, 1, 1), 0)
        solution = solve_certified(blocks[i], z, plan.solvers[i], labels, certify, slots, plan.tolerance)
        lost = lost | (solution.status == Status.NONFINITE)
        status = solution.status.masked_fill(lost, Status.NONFINITE)
        solutions[i] = replace(solution, status=status, residual=solution.residual.masked_fill(lost, torch.inf))
        return solution.x.masked_fill(lost.view(-1, 1, 1), torch.nan)

    def after(i: int, x: Tensor) -> None:
        if return_trace:
            trace.append(flow.to_images(x))
        note_block()

    x = invert(flow, x, solve_block, after)
    return _Group(flow.to_images(x), [solutions[i] for i in range(len(blocks))], trace)


def check_settings(
    flow: ImageFlow, batch_size: int | None, denoise: float, certify: Certificate
) -> tuple[int | None, float]:
    """Returns `batch_size` and `denoise` as Python numbers; raises if a setting of `sample` does not fit the flow."""
    check_flow(flow)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    denoise = check_rate(flow, denoise)
    check_certificate("certify", certify)
    return batch_size, denoise


def warn_if_guidance_is_idle(flow: ImageFlow, labels: Tensor | None) -> None:
    """Warns the caller's caller if guidance takes the same row twice."""
    if flow.guidance is not None and labels is None and flow.guidance.attn_temperature == 1:
        warnings.warn("guidance without labels at attn_temperature 1 changes nothing", stacklevel=3)


def _checked_latents(
    flow: ImageFlow, num: int | None, latents: Tensor | None, labels: Labels | None, seed: int, name: str = "latents"
) -> tuple[Float[Tensor, "n t d"], Int[Tensor, " n"] | None]:
    """Returns the latents, or else new ones, and the labels as a tensor, after a check that both fit the flow."""
    if (num is None) == (latents is None):
        raise InputValueError("give either num or latents")
    shape = (flow.config.num_tokens, flow.config.token_channels)
    seed = check_seed(seed)
    if latents is not None:
        check_floating(name, latents, ("N", *shape))
        check_finite(name, latents)
        if latents.requires_grad and torch.is_grad_enabled():
            raise InputValueError(
                f"{name}={short(latents)} requires a gradient, and sampling has none: give {name}.detach()"
            )
        num = len(latents)
    num = check_count("num", num, most=MOST_SAMPLES)
    classes = None if labels is None else flow.check_labels(labels, num)
    return draw_latents(num, *shape, seed) if latents is None else latents, classes
