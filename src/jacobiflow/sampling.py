"""Samples images: latents through the blocks of a flow, each solved by a strategy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.checks import check_count, check_finite, check_flag, check_floating, check_kind, short
from jacobiflow.denoising import check_rate, denoised
from jacobiflow.errors import InputValueError
from jacobiflow.flows.config import Labels
from jacobiflow.flows.image_flow import ImageFlow, check_flow, state_dtype
from jacobiflow.latents import MOST_SAMPLES, draw_latents
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
        sums = ("sweeps", "network_calls", "token_evaluations", "seconds")
        rows = ("residual", "status", "exact", "resolved_sequentially")
        values: dict[str, Any] = {name: sum(getattr(solution, name) for solution in solutions) for name in sums}
        values |= {name: torch.cat([getattr(solution, name) for solution in solutions]) for name in rows}
        return cls(**values)


@dataclass(frozen=True)
class Outcome:
    """Counts of the samples that are certified, solved again, above the tolerance, or lost.

    Attributes:
        tolerance: The largest residual allowed in any block; `None` if a block stops after a number of sweeps.
        residual: The largest finite residual; `None` without certificates.
        exact: Every block of every sample was solved token by token.
        resolved: Samples that some block solved again token by token.
        above: Samples above the tolerance, by the rounding of the network.
        lost: Samples without an image, since the exact inverse overflows.
    """

    num: int
    tolerance: float | None
    residual: float | None
    exact: bool
    resolved: int
    above: int
    lost: int

    @property
    def has_shortfall(self) -> bool:
        """True if a sample was measured and is neither exact nor within a tolerance, or if one is lost."""
        uncertified = self.residual is not None and self.tolerance is None and not self.exact
        return uncertified or self.above > 0 or self.lost > 0

    def __str__(self) -> str:
        """One sentence for the user, with the remedy if there is a shortfall."""
        if self.exact:
            parts = [f"{self.num - self.lost:,} exact, since every block was solved token by token"]
        elif self.residual is None:
            parts = ["not certified, since certificates were turned off"]
        elif self.tolerance is None:
            parts = ["not certified, since the strategy stops after a fixed number of sweeps"]
            parts.append(f"the largest residual is {self.residual:.1e}")
        else:
            parts = [f"{self.num - self.above - self.lost:,} certified to {self.tolerance:g}"]
        if self.resolved:
            parts.append(f"{self.resolved:,} solved again token by token")
        if self.above:
            parts.append(
                f"{self.above:,} above the tolerance, up to {self.residual:.1e}, by the rounding of the network: raise "
                "the tolerance, or use a wider dtype"
            )
        if self.lost:
            parts.append(
                f"{self.lost:,} lost, since the exact inverse overflows too: lower the guidance, or use a wider dtype"
            )
        return f"{self.num:,} sample{'s' * (self.num > 1)}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Samples:
    """Images, their certificates and their cost.

    Attributes:
        images: Nominally in [-1, 1], not clipped; NaN if the exact inverse overflows.
        latents: Standard normal, before the prior's scale.
        labels: Classes, or `None`.
        stats: A `BlockStats` for each block, in encoding order.
        certificate: Per sample the largest |g(x) - x| over tokens, channels and blocks, guidance included, before
            denoising; `None` without certificates. A block that was solved token by token is exact by construction and
            counts as 0, unless it was measured too.
        tolerance: The residual that every block was held to; `None` if the strategy has blocks that stop after a fixed
            number of sweeps. Their samples are not certified, see `outcome`.
        trace: The noise, the image after each block in sampling order, and the denoised image; `None` without a trace.
        seconds: Wall-clock time of solving all blocks; that of denoising is `denoise_seconds`.

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
        latents: Standard normal, before the prior's scale.
        strategy: A name (see `jacobiflow.strategy.choose`), a `Strategy`, or the path of its JSON file.
        denoise: Rate of one denoising step; 0 is off.
        tolerance: The largest |g(x) - x| in any block that stops on a tolerance; refused if none does. `None`: 1e-3 for
            a named strategy, its own for any other.
        certify: Measures the residual of every sample in every block, one parallel pass each, and solves again each
            sample above the tolerance. Blocks that are solved token by token need no such pass; "always" measures them
            too. Without certificates a token is final when its last sweep changed it by at most the tolerance; its
            residual is then not known, and can be larger.
        batch_size: Samples in the network at a time, all by default.
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
    check_flow(flow)
    check_certificate("certify", certify)
    denoise = check_rate(flow, denoise)
    check_flag("return_trace", return_trace)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    if num is not None and latents is None:
        latents = draw_latents(num, flow.config.num_tokens, flow.config.token_channels, seed)
    elif num is not None or latents is None:
        raise InputValueError("give either num or latents")
    _check_latents("latents", latents, flow)
    labels = None if labels is None else flow.check_labels(labels, len(latents))
    if batch_size is not None:
        batch_size = min(check_count("batch_size", batch_size, most=MOST_SAMPLES), len(latents))
    warn_if_guidance_is_idle(flow, labels)
    plan = choose(flow, strategy, batch_size or len(latents), tolerance=tolerance)
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
    slots = batch_size or len(latents)
    starts = range(0, len(latents), slots * _GROUP)
    solved = count(1)

    def note_block() -> None:
        if progress is not None:
            progress(next(solved), len(starts) * len(flow.blocks), "sampling")

    started = time.perf_counter()
    groups = []
    for start in starts:
        rows = slice(start, start + slots * _GROUP)
        classes = None if labels is None else labels[rows]
        groups.append(_solve(flow, plan, latents[rows], classes, certify, slots, return_trace, note_block))
    seconds = time.perf_counter() - started

    parts, solutions, traces = zip(*groups, strict=True)
    images = torch.cat(parts)
    stats = tuple(map(BlockStats.join, zip(*solutions, strict=True)))
    trace = [torch.cat(steps) for steps in zip(*traces, strict=True)]
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


def _solve(
    flow: ImageFlow, plan: Strategy, latents: Tensor, labels: Tensor | None, certify: Certificate, slots: int,
    return_trace: bool, note_block: Callable[[], None],
) -> tuple[Tensor, list[Solution], list[Tensor]]:  # fmt: skip
    """Images, the solution of each block in encoding order, and the trace."""
    x, blocks = flow.prior_tokens(latents), flow.inverse_blocks
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
        x = solution.x.masked_fill(lost.view(-1, 1, 1), torch.nan)
        if return_trace:
            trace.append(flow.to_images(flow.blocks[i].permutation(x)))
        note_block()
        return x

    x = flow.invert(x, solve_block)
    return flow.to_images(x), [solutions[i] for i in range(len(blocks))], trace


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
    check_flow(flow)
    check_certificate("certify", certify)
    _check_latents("z", z, flow)
    labels = None if labels is None else flow.check_labels(labels, len(z))
    result = draw(flow, choose(flow, strategy, len(z), tolerance=tolerance), z, labels, certify=certify)
    if result.outcome.has_shortfall:
        warnings.warn(str(result.outcome), stacklevel=2)
    return result


def warn_if_guidance_is_idle(flow: ImageFlow, labels: Tensor | None) -> None:
    """Warns the caller's caller if guidance takes the same row twice."""
    if flow.guidance is not None and labels is None and flow.guidance.attn_temperature == 1:
        warnings.warn("guidance without labels at attn_temperature 1 changes nothing", stacklevel=3)


def _check_latents(name: str, latents: Tensor, flow: ImageFlow) -> None:
    check_floating(name, latents, ("N", flow.config.num_tokens, flow.config.token_channels))
    check_finite(name, latents)
    if latents.requires_grad and torch.is_grad_enabled():
        raise InputValueError(
            f"{name}={short(latents)} requires a gradient, and sampling has none: give {name}.detach()"
        )
