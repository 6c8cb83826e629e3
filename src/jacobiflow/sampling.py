"""Draw images: latents through the blocks of a flow, each solved as a strategy says."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from jacobiflow.checks import check_count, check_finite, check_flag, check_floating, check_kind, check_seed, short
from jacobiflow.denoising import check_rate, denoised
from jacobiflow.errors import InputValueError
from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.image_flow import ImageFlow, check_flow, state_dtype
from jacobiflow.flows.labels import Labels
from jacobiflow.guidance import Guidance, check_guidance, guided
from jacobiflow.inversion import invert, prior_tokens
from jacobiflow.latents import MOST_SAMPLES, draw_latents
from jacobiflow.outcome import Outcome
from jacobiflow.solvers import Certificate, Solution, Status, check_certificate, solve_certified
from jacobiflow.strategy import Strategy, choose

_GROUP = 16  # batches that go through a block before the next block: a progress bar's step, and bounded memory


@dataclass(frozen=True)
class BlockStats:
    """What one block cost and how it ended, over all samples of a run.

    `residual`, `status`, `exact` and `resolved_sequentially` are per sample (N,); the rest are sums, as in
    `jacobiflow.solvers.Solution`. Under guidance a network call evaluates two rows per sample.
    """

    sweeps: int
    network_calls: int
    token_evaluations: int
    seconds: float
    residual: Float[Tensor, " n"]
    status: Int[Tensor, " n"]
    exact: Bool[Tensor, " n"]
    resolved_sequentially: Bool[Tensor, " n"]


@dataclass(frozen=True)
class Samples:
    """Images and how they came about.

    **Attributes:**

    - `images`: (N, C, H, W), nominally in [-1, 1], not clipped; NaN where the exact inverse overflows.
    - `latents`: (N, T, C), standard normal, before the prior's scale.
    - `labels`: (N,) or `None`.
    - `stats`: a `BlockStats` per block, in encoding order.
    - `certificate`: per sample (N,) the largest |g(x) - x| over tokens, channels and blocks, guidance included, before
        denoising; `None` where it was not asked for. A block that was solved token by token is exact by construction
        and counts as 0, unless it was asked to be measured too.
    - `tolerance`: the residual that every block was held to; `None` if the strategy has blocks that stop after a fixed
        number of sweeps. Their samples are not certified, see `outcome`.
    - `trace`: the noise, the image after each block in sampling order, and the denoised image; `None` unless asked for.
    - `seconds`: wall-clock time of solving all blocks; `denoise_seconds`: of denoising.
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
        """Network calls over all blocks."""
        return sum(block.network_calls for block in self.stats)

    @property
    def token_evaluations(self) -> int:
        """Token evaluations over all blocks."""
        return sum(block.token_evaluations for block in self.stats)

    @property
    def resolved_sequentially(self) -> int:
        """How many samples some block solved again token by token."""
        return int(torch.stack([block.resolved_sequentially for block in self.stats]).any(dim=0).sum())

    @property
    def exact(self) -> Bool[Tensor, " n"]:
        """Which samples are exact by construction: every block was solved token by token."""
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
    guidance: Guidance | None = None,
    denoise: float = 0.0,
    tolerance: float | None = None,
    certify: Certificate = True,
    batch_size: int | None = None,
    return_trace: bool = False,
    progress: bool | Callable[[float], None] = True,
) -> Samples:
    """Sample images x = f^-1(z): the inverse of every block, last first, each to its tolerance.

    **Arguments:**

    - `flow`: the model; its device is used.
    - `num`: how many; or give `latents` (N, T, C), standard normal, before the prior's scale.
    - `labels`: (N,) classes, as a tensor, a list or an array, or one class for all; a label below 0, or `None`, takes
        the unconditional row.
    - `seed`: fixes the latent of sample i, whatever the batch size.
    - `strategy`: a name (see `jacobiflow.strategy.choose`), a `Strategy`, or the path of its JSON file.
    - `guidance`: a `Guidance`, or `None`.
    - `denoise`: rate of one denoising step; 0 is off.
    - `tolerance`: largest |g(x) - x| allowed in any block that stops on a tolerance; refused where none does. `None`:
        1e-3 for a named strategy, its own for any other.
    - `certify`: measure the residual of every sample in every block, one parallel pass each, and solve again what is
        above the tolerance. Blocks that are solved token by token are exact by construction and need no such pass;
        "always" measures them too. Without certificates a token is taken when its last sweep changed it by at most the
        tolerance; the residual of what is returned is then not known, and can be above it.
    - `batch_size`: samples in the network at a time, all by default. Where samples have fronts of their own (see
        `jacobiflow.solve`), the next ones take the places of those that have finished.
    - `return_trace`: keep the image after every block.
    - `progress`: show a bar on a terminal; or a function, which is called with the share that is solved, from 0 to 1.

    **Returns:** `Samples`. A sample that missed its tolerance or overflowed was solved again sequentially and is
    counted there; none is redrawn. One that overflows in the exact inverse too is NaN. A warning says so, as it does if
    samples are above the tolerance or if the strategy certifies none.

    **Raises:** `ValueError` for labels, latents, strategies or settings that do not fit the flow, `TypeError` for other
    kinds of them.
    """
    batch_size, denoise = check_settings(flow, batch_size, guidance, denoise, certify)
    check_flag("return_trace", return_trace)
    check_kind("progress", progress, bool | Callable, "True, False or a function of the share that is solved")
    latents, labels = _checked_latents(flow, num, latents, labels, seed)
    warn_if_guidance_is_idle(guidance, labels)
    console = Console(stderr=True)
    say = console.print if progress is True and console.is_terminal else lambda text: None
    slots = min(batch_size or len(latents), len(latents))
    plan = choose(flow, strategy, slots, tolerance=tolerance, guidance=guidance, say=say)
    result = draw(
        flow, plan, latents, labels, guidance=guidance, denoise=denoise, certify=certify, batch_size=batch_size,
        return_trace=return_trace, progress=progress,
    )  # fmt: skip
    if result.outcome.has_shortfall:
        warnings.warn(str(result.outcome), stacklevel=2)
    return result


def draw(
    flow: ImageFlow, plan: Strategy, latents: Float[Tensor, "n t d"], labels: Int[Tensor, " n"] | None = None, *,
    guidance: Guidance | None = None, denoise: float = 0.0, certify: Certificate = True,
    batch_size: int | None = None, return_trace: bool = False, progress: bool | Callable[[float], None] = False,
) -> Samples:  # fmt: skip
    """Solves all blocks at the latents by a plan, as `sample` does, without its checks and its warning."""
    latents = latents.to(flow.var.device, state_dtype(flow))
    labels = None if labels is None else labels.to(flow.var.device)
    blocks = [guided(block, guidance) for block in flow.blocks]
    slots = batch_size or len(latents)
    console = Console(stderr=True)

    started = time.perf_counter()
    with Progress(console=console, disable=progress is not True or not console.is_terminal, transient=True) as bar:
        spans = list(_spans(len(latents), slots * _GROUP))
        task = bar.add_task("sampling", total=len(spans) * len(blocks))

        def advance() -> None:
            bar.advance(task)
            if callable(progress):
                progress(bar.tasks[task].completed / (len(spans) * len(blocks)))

        solving = partial(_solve_group, flow, blocks, plan, certify, slots, return_trace, advance)
        solved = [solving(latents[span], None if labels is None else labels[span]) for span in spans]
    seconds = time.perf_counter() - started

    images = torch.cat([group.images for group in solved])
    stats = tuple(_stats([group.solutions[i] for group in solved]) for i in range(len(blocks)))
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
    """The inverse of `flow.encode`: images whose latents are `z`, without guidance or denoising. See `sample`."""
    check_settings(flow, None, None, 0.0, certify)
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
    flow: ImageFlow, blocks: list[AffineBlock], plan: Strategy, certify: Certificate, slots: int, return_trace: bool,
    advance: Callable[[], None], latents: Tensor, labels: Tensor | None,
) -> _Group:  # fmt: skip
    x = prior_tokens(flow, latents)
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
        advance()

    x = invert(flow, x, solve_block, after)
    return _Group(flow.to_images(x), [solutions[i] for i in range(len(blocks))], trace)


def _stats(solutions: Iterable[Solution]) -> BlockStats:
    solutions = list(solutions)
    return BlockStats(
        sweeps=sum(s.sweeps for s in solutions),
        network_calls=sum(s.network_calls for s in solutions),
        token_evaluations=sum(s.token_evaluations for s in solutions),
        seconds=sum(s.seconds for s in solutions),
        residual=torch.cat([s.residual for s in solutions]),
        status=torch.cat([s.status for s in solutions]),
        exact=torch.cat([s.exact for s in solutions]),
        resolved_sequentially=torch.cat([s.resolved_sequentially for s in solutions]),
    )


def _spans(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def check_settings(
    flow: ImageFlow, batch_size: int | None, guidance: Guidance | None, denoise: float, certify: Certificate
) -> tuple[int | None, float]:
    """`batch_size` and `denoise` as Python numbers. **Raises** `TypeError` or `ValueError` for settings that `sample`
    does not take, or that do not fit the flow.
    """
    check_flow(flow)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, most=MOST_SAMPLES)
    check_guidance(guidance)
    denoise = check_rate(flow, denoise)
    check_certificate("certify", certify)
    return batch_size, denoise


def warn_if_guidance_is_idle(guidance: Guidance | None, labels: Tensor | None) -> None:
    """Warns the caller's caller if guidance takes the same row twice."""
    if guidance is not None and labels is None and guidance.attn_temperature == 1:
        warnings.warn("guidance without labels at attn_temperature 1 changes nothing", stacklevel=3)


def _checked_latents(
    flow: ImageFlow, num: int | None, latents: Tensor | None, labels: Labels | None, seed: int, name: str = "latents"
) -> tuple[Float[Tensor, "n t d"], Int[Tensor, " n"] | None]:
    """The latents, or else new ones, and the labels as a tensor, after a check that both fit the flow."""
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
