"""Samples a flow: latents through its blocks, each solved by a strategy."""

from __future__ import annotations

import copy
import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.blocks.guidance import SamplingSettings, guided
from jacobiflow.data import image_grid
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import CertifyMode, Sequential, Solution, Solver, Status, check_certify_mode
from jacobiflow.fixed_point.certificate import solve_certified_unchecked
from jacobiflow.fixed_point.implicit import invert_with_gradient
from jacobiflow.models.config import Context, Labels
from jacobiflow.models.flow import Flow, check_flow, check_rate, log_normal, precision, state_dtype
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MOST_SAMPLES, draw_latents
from jacobiflow.planner import Strategy, choose
from jacobiflow.sampling.denoise import denoised
from jacobiflow.utils.checks import (
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_floating,
    check_kind,
    format_value,
)
from jacobiflow.utils.files import write_atomically
from jacobiflow.utils.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

Settings = SamplingSettings | Literal["recommended"] | None
"""Guidance and denoising: values, those that the model recommends, or neither."""

SENSITIVITY_BOUND = 1e-2
"""The change of an entry of x, in the units of x, above which `Outcome` counts a sample as sensitive to rounding."""
MEASURED_SENSITIVITY = SENSITIVITY_BOUND / 40  # an estimate above it is replaced by a solve in float64
_REMEDIES = {"float32": ": use float64", "tf32": ": use float32", "float64": ""}
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
    used_fallback: Bool[Tensor, " n"]

    @classmethod
    def join(cls, solutions: Sequence[Solution]) -> BlockStats:
        """Returns the sums over solutions of different samples, and the entries of all samples."""
        columns = ([getattr(solution, entry.name) for solution in solutions] for entry in fields(cls))
        values: Any = (torch.cat(column) if isinstance(column[0], Tensor) else sum(column) for column in columns)
        return cls(*values)


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
        sensitivity: The largest finite sensitivity; `None` if it was not measured.
        sensitive: Samples with a sensitivity above `SENSITIVITY_BOUND`; `None` if it was not measured.
        dtype: Of the network, or "tf32".
    """

    num: int
    tolerance: float | None
    residual: float | None
    exact: bool
    resolved: int
    above: int
    lost: int
    sensitivity: float | None = None
    sensitive: int | None = None
    dtype: str = "float32"

    @property
    def has_shortfall(self) -> bool:
        """True if a sample was measured and is neither exact nor within a tolerance, or if one is lost or sensitive."""
        uncertified = self.residual is not None and self.tolerance is None and not self.exact
        return uncertified or self.above > 0 or self.lost > 0 or bool(self.sensitive)

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
        if self.sensitive:
            parts.append(
                f"{self.sensitive:,} of {self.num:,} samples amplify {self.dtype} rounding above {SENSITIVITY_BOUND:g}"
                + _REMEDIES.get(self.dtype, ": use a wider dtype")
            )
        elif self.sensitivity is not None:
            parts.append(f"{self.dtype} rounding changes samples by up to {self.sensitivity:.1e}")
        return f"{self.num:,} sample{'s' * (self.num > 1)}: {'; '.join(parts)}"


@dataclass(frozen=True, repr=False)
class Samples:
    """Samples, their certificates, densities and cost.

    Attributes:
        x: Images, nominally in [-1, 1] and not clipped, or tokens; NaN if the exact inverse overflows.
        latents: Standard normal, before the prior's scale.
        context: Labels or numbers, or `None`.
        log_prob: The log-density of each sample under the flow in nats, at this x. `None` if it was not asked for.
        stats: A `BlockStats` for each block, in encoding order.
        certificate: Per sample the largest |g(x) - x| over tokens, channels and blocks, guidance included, before
            denoising; `None` without certificates. A block that was solved token by token is exact by construction and
            counts as 0, unless it was measured too.
        tolerance: The residual that every block was held to; `None` if the strategy has blocks that stop after a fixed
            number of sweeps. Their samples are not certified, see `outcome`.
        trace: The noise, x after each block in sampling order, and the denoised image; `None` without a trace.
        seconds: Wall-clock time of solving all blocks; that of denoising is `denoise_seconds`.
        sensitivity: Per sample the largest change of an entry of x by rounding, before denoising and in the units of x.
            It is an estimate by a second solve, from latents that one rounding of `dtype` changes. For an exact sample
            that moves by more than 2.5e-4 it is the difference from a solve in float64. It is infinite if the sample is
            lost, or overflows in the second solve, and `None` if it was not asked for.
        dtype: Of the network, or "tf32".

    Example:
        >>> samples = jf.sample(jf.load("digits-p1"), 3, labels=[1, 2, 3])
        >>> print(samples.outcome)
        3 samples: 3 exact, since every block was solved token by token
        >>> samples.grid().size
        (352, 120)
    """

    x: Float[Tensor, "n ..."]
    latents: Float[Tensor, "n t d"]
    context: Tensor | None
    log_prob: Float[Tensor, " n"] | None
    stats: tuple[BlockStats, ...]
    certificate: Float[Tensor, " n"] | None
    tolerance: float | None
    trace: tuple[Float[Tensor, "n ..."], ...] | None
    seconds: float
    denoise_seconds: float
    sensitivity: Float[Tensor, " n"] | None = None
    dtype: str = "float32"

    @property
    def images(self) -> Float[Tensor, "n c h w"]:
        """`x` of a flow over images."""
        if self.x.ndim != 4:
            raise InputValueError("images: these are samples of a flow over tokens; take .tokens")
        return self.x

    @property
    def tokens(self) -> Float[Tensor, "n t d"]:
        """`x` of a flow over tokens."""
        if self.x.ndim != 3:
            raise InputValueError("tokens: these are samples of a flow over images; take .images")
        return self.x

    @property
    def network_calls(self) -> int:
        """The network calls of all blocks."""
        return sum(block.network_calls for block in self.stats)

    @property
    def token_evaluations(self) -> int:
        """The token evaluations of all blocks."""
        return sum(block.token_evaluations for block in self.stats)

    @property
    def used_fallback(self) -> int:
        """The number of samples that some block solved again token by token."""
        return int(torch.stack([block.used_fallback for block in self.stats]).any(dim=0).sum())

    @property
    def exact(self) -> Bool[Tensor, " n"]:
        """True for samples that are exact by construction: every block was solved token by token."""
        return torch.stack([block.exact for block in self.stats]).all(dim=0)

    @property
    def status(self) -> Int[Tensor, " n"]:
        """The worst `Status` of each sample over its blocks."""
        return torch.stack([block.status for block in self.stats]).amax(dim=0)

    def __repr__(self) -> str:
        return f"Samples({tuple(self.x.shape)}; {self.outcome}; {self.seconds + self.denoise_seconds:.2g} s)"

    def grid(self, columns: int = 10) -> Image:
        """Returns the images as one picture, which a notebook shows; needs Pillow."""
        return image_grid(self.images, min(columns, len(self.x)))

    def save(self, folder: str | Path) -> None:
        """Writes samples.npz, with all that is known of each sample, and of images a PNG each.

        Its arrays are `x`, `latents`, `labels` or `context`, `log_prob`, `certificate`, `sensitivity`, `status` and
        `exact`, without those that there are not. `sample_to_folder` is for more samples than fit in memory, and
        resumes.
        """
        folder, is_labels = Path(folder), self.context is not None and not self.context.is_floating_point()
        arrays = {
            "x": self.x, "latents": self.latents, "labels" if is_labels else "context": self.context,
            "log_prob": self.log_prob, "certificate": self.certificate, "sensitivity": self.sensitivity,
            "status": self.status, "exact": self.exact,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "samples.npz", npz_bytes(arrays))
        for i, image in enumerate(self.x if self.x.ndim == 4 else ()):
            image_grid(image.unsqueeze(0), 1, zoom=1, gap=0).save(folder / f"{i:05}.png")

    @property
    def outcome(self) -> Outcome:
        """Counts of certified samples and of the others; `print(out.outcome)` gives them in a sentence."""
        status, certificate = self.status, self.certificate
        num_lost = int((status == Status.NONFINITE).sum())
        return Outcome(
            num=len(status),
            tolerance=self.tolerance,
            residual=None if certificate is None else float(certificate.nan_to_num(posinf=0.0).max()),
            exact=bool(self.exact.all()),
            resolved=self.used_fallback,
            above=int((status == Status.ROUNDING).sum()),
            lost=num_lost,
            dtype=self.dtype,
            **sensitivity_counts(self.sensitivity, num_lost),
        )


def sensitivity_counts(sensitivity: Float[Tensor, " n"] | None, num_lost: int) -> dict[str, Any]:
    """Returns the entries of an `Outcome` about sensitivity; lost samples do not count."""
    if sensitivity is None:
        return {}
    num_above = int((sensitivity > SENSITIVITY_BOUND).sum())
    return {"sensitivity": float(sensitivity.nan_to_num(posinf=0.0).max()), "sensitive": num_above - num_lost}


def npz_bytes(arrays: Mapping[str, Tensor | None]) -> bytes:
    """Returns the arrays as the bytes of an .npz file, which holds no date; those that are `None` are left out."""
    stored: dict[str, Any] = {name: each.detach().cpu().numpy() for name, each in arrays.items() if each is not None}
    npz = io.BytesIO()
    np.savez(npz, **stored)
    return npz.getvalue()


def sample(
    flow: Flow,
    num: int | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    *,
    context: Context | None = None,
    latents: Float[Tensor, "n t d"] | None = None,
    settings: Settings = "recommended",
    strategy: str | Path | Strategy = "auto",
    tolerance: float | None = None,
    certify: CertifyMode = True,
    sensitivity: bool = False,
    batch_size: int | None = None,
    log_prob: bool | None = None,
    return_trace: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """Draws samples x = f^-1(z): the inverse of every block, last first, each to its tolerance.

    Args:
        flow: The model, or a view of it under guidance (`flow.guided(...)`), which keeps its own; its device is used.
        num: The number of samples; or give `latents`.
        labels: Classes, or one class for all. A label below 0, or `None`, takes the unconditional row.
        context: In place of labels: numbers (N, K) for each sample or (N, T, K) for each token, or prompts.
        seed: Fixes the latent of sample i, whatever the batch size.
        latents: Standard normal, before the prior's scale.
        settings: Guidance and denoising: "recommended" by the model, if it recommends some (guidance if there are
            labels or prompts); `None` for neither; or `SamplingSettings`.
        strategy: A name (see `jacobiflow.planner.choose`), a `Strategy`, or the path of its JSON file.
        tolerance: The largest |g(x) - x| in any block; by default 1e-3 for a named strategy, and else the strategy's
            own. Refused if no block of the strategy stops on a tolerance.
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
        return_trace: Returns x after every block, too.
        progress: Is called after each block.

    Returns:
        `Samples`. A sample that misses its tolerance or overflows is solved again token by token, and counted. If its
        exact inverse overflows, too, it is NaN. A warning says if samples are lost, above the tolerance, uncertified,
        or sensitive to rounding.

    Example:
        >>> samples = jf.sample(jf.load("digits-p1"), 4, labels=[0, 1, 2, 3], strategy="jacobi")
        >>> samples.images.shape, bool((samples.certificate <= 1e-3).all())
        (torch.Size([4, 1, 8, 8]), True)
    """
    check_flow(flow)
    check_certify_mode("certify", certify)
    check_flag("sensitivity", sensitivity)
    check_flag("return_trace", return_trace)
    check_kind("progress", progress, Callable | None, "a function of done, total and what, or None")
    if num is not None and latents is None:
        latents = draw_latents(num, flow.config.num_tokens, flow.config.token_channels, seed)
    elif num is not None or latents is None:
        raise InputValueError("give either num or latents")
    _check_latents("latents", latents, flow)
    if latents.requires_grad and torch.is_grad_enabled():
        raise InputValueError(
            f"latents={format_value(latents)} requires a gradient: give latents.detach(), or use decode"
        )
    context = flow.check_one_context(labels, context, len(latents))
    flow, denoise = resolve_settings(flow, settings, context)
    log_prob = check_log_prob(flow, log_prob, denoise)
    if batch_size is not None:
        batch_size = min(check_count("batch_size", batch_size, maximum=MOST_SAMPLES), len(latents))
    warn_if_guidance_is_idle(flow, context)
    plan = choose(flow, strategy, batch_size or len(latents), tolerance=tolerance)
    with torch.no_grad():
        result = draw(
            flow, plan, latents, context, denoise=denoise, certify=certify, sensitivity=sensitivity,
            batch_size=batch_size, log_prob=log_prob, return_trace=return_trace, progress=progress,
        )  # fmt: skip
    if result.outcome.has_shortfall:
        warnings.warn(str(result.outcome), stacklevel=2)
    return result


def draw(
    flow: Flow, plan: Strategy, latents: Float[Tensor, "n t d"], context: Tensor | None = None, *,
    denoise: float = 0.0, certify: CertifyMode = True, sensitivity: bool = False, batch_size: int | None = None,
    log_prob: bool = False, return_trace: bool = False, progress: Progress | None = None,
) -> Samples:  # fmt: skip
    """Solves all blocks at the latents by a plan, as `sample` does, without its checks and its warning.

    The samples have gradients if they are enabled.
    """
    latents = latents.to(flow.var.device, state_dtype(flow))
    context = None if context is None else context.to(flow.var.device)
    slots = batch_size or len(latents)
    starts = range(0, len(latents), slots * _GROUP)
    solved = count(1)

    def note_block() -> None:
        if progress is not None:
            progress(next(solved), len(starts) * len(flow.blocks) * (1 + sensitivity), "sampling")

    started = time.perf_counter()
    groups, changes = [], []
    for start in starts:
        rows = slice(start, start + slots * _GROUP)
        part = None if context is None else context[rows]
        group = _Group(flow, plan, latents[rows], part, certify, slots)
        group.solve(note_block, return_trace)
        groups.append(group)
        if sensitivity:
            other = _Group(flow, plan, _change_last_bits(flow, latents[rows]), part, certify, slots)
            other.solve(note_block, return_trace=False)
            changes.append(group.change_to(other.x))
            doubtful = (changes[-1] > MEASURED_SENSITIVITY) & group.is_exact() & ~group.lost
            if doubtful.any() and state_dtype(flow) != torch.float64:
                changes[-1][doubtful] = group.change_to(group.solve_in_float64(doubtful), doubtful)
    log_probs = [group.log_prob() for group in groups] if log_prob else []
    seconds = time.perf_counter() - started

    x = torch.cat([flow.from_tokens(group.x) for group in groups])
    stats = tuple(map(BlockStats.join, zip(*([*group.solutions] for group in groups), strict=True)))
    trace = [torch.cat(steps) for steps in zip(*(group.trace for group in groups), strict=True)]
    started = time.perf_counter()
    if denoise:
        x = denoised(flow, x, context, denoise, batch_size or 64)
        trace.append(x)
    return Samples(
        x=x,
        latents=latents,
        context=context,
        log_prob=torch.cat(log_probs) if log_prob else None,
        stats=stats,
        certificate=torch.stack([block.residual for block in stats]).amax(dim=0) if certify else None,
        tolerance=plan.residual_bound(flow.config.num_tokens),
        trace=tuple(trace) if return_trace else None,
        seconds=seconds,
        denoise_seconds=time.perf_counter() - started,
        sensitivity=torch.cat(changes) if sensitivity else None,
        dtype=precision(flow),
    )


def _change_last_bits(flow: Flow, latents: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
    """Returns the latents after one rounding of the flow's dtype, up or down by the same pattern in each sample."""
    eps = 2**-10 if precision(flow) == "tf32" else torch.finfo(flow.var.dtype).eps
    _, num_tokens, channels = latents.shape
    signs = draw_latents(1, num_tokens, channels, start=FIRST_CALIBRATION_LATENT).sign().to(latents)
    return latents + eps * signs * latents.abs().clamp(min=1)  # latents near 0 are changed, too


class _Group:
    """Samples that go through a block before the next block: their tokens, solutions in encoding order, and trace."""

    def __init__(
        self, flow: Flow, plan: Strategy, latents: Tensor, context: Tensor | None, certify: CertifyMode, slots: int
    ) -> None:
        self.flow, self.plan, self.latents, self.context = flow, plan, latents, context
        self.certify, self.slots, self.blocks = certify, slots, flow.inverse_blocks
        self.x = flow.prior_tokens(latents)
        self.lost = ~torch.isfinite(self.x).all(dim=(1, 2))
        self.solutions: list[Solution] = []
        self.log_det = self.x.new_zeros(len(latents))
        self.trace: list[Tensor] = []

    def solve(self, note_block: Callable[[], None], return_trace: bool) -> None:
        """Solves all blocks, last first."""

        def solve_block(i: int, z: Tensor) -> Tensor:
            # A sample lost in an earlier block goes on as zeros, so that the rest of its group can be solved.
            z = z.masked_fill(self.lost.view(-1, 1, 1), 0)
            parameters = [parameter for parameter in self.flow.blocks[i].parameters() if parameter.requires_grad]
            inputs = [z, *parameters] if self.context is None else [z, self.context, *parameters]
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
                x, log_det = invert_with_gradient(
                    self.blocks[i], parameters, partial(self._solve_block, i), z, self.context
                )
            else:
                x, log_det = self._solve_block(i, z)
            self.log_det = self.log_det + log_det
            x = x.masked_fill(self.lost.view(-1, 1, 1), torch.nan)
            if return_trace:
                self.trace.append(self.flow.from_tokens(self.flow.blocks[i].permutation.inverse(x)))
            note_block()
            return x

        if return_trace:
            self.trace.append(self.flow.from_tokens(self.x))
        self.x = self.flow.invert(self.x, solve_block)
        self.solutions.reverse()

    def _solve_block(self, i: int, z: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve_certified_unchecked(
            self.blocks[i], z, self.plan.solvers[i], self.context, self.certify, self.slots, self.plan.tolerance
        )
        self.lost = self.lost | (solution.status == Status.NONFINITE)
        status = solution.status.masked_fill(self.lost, Status.NONFINITE)
        residual = solution.residual.masked_fill(self.lost, torch.inf)
        self.solutions.append(replace(solution, status=status, residual=residual))
        return solution.x, solution.log_det

    def is_exact(self) -> Bool[Tensor, " n"]:
        """Returns which samples were solved token by token in every block."""
        return torch.stack([solution.exact for solution in self.solutions]).all(dim=0)

    def change_to(
        self, tokens: Float[Tensor, "m t d"], rows: Bool[Tensor, " n"] | slice = slice(None)
    ) -> Float[Tensor, " m"]:
        """Returns the largest difference of an entry of x between these samples and others, given as tokens."""
        change = self.flow.from_tokens(tokens) - self.flow.from_tokens(self.x[rows])
        return change.abs().flatten(1).amax(dim=1).nan_to_num(nan=torch.inf, posinf=torch.inf).to(self.x.dtype)

    def solve_in_float64(self, rows: Bool[Tensor, " n"]) -> Float[Tensor, "m t d"]:
        """Returns the tokens of some samples in float64, with a copy of one block at a time."""
        latents, context = self.latents[rows].double(), None if self.context is None else self.context[rows]

        def solve_block(i: int, z: Tensor) -> Tensor:
            block = guided(copy.deepcopy(self.flow.blocks[i]).double(), self.flow.guidance)
            return solve_certified_unchecked(block, z, Solver(Sequential()), context, False, self.slots, None).x

        return self.flow.invert(latents * self.flow.var.double().sqrt(), solve_block)

    def log_prob(self) -> Float[Tensor, " n"]:
        """Returns the log-densities of the samples at x.

        If all blocks are exact, x encodes to the latents and through the tokens that were solved, so that the sums of
        log-scales are known. Else a block solved to a tolerance moves the tokens that the blocks after it would
        read in encoding: these samples are encoded.
        """
        flow, var = self.flow, self.flow.var.to(self.x.dtype)
        log_prob = log_normal(self.latents) - self.log_det - 0.5 * var.log().sum() + flow.tokens_log_det(self.x)
        is_open = (~self.is_exact() | self.log_det.isnan()) & ~self.lost
        rows = is_open.nonzero().flatten()
        for some in rows.split(self.slots) if len(rows) else ():
            context = None if self.context is None else self.context[some]
            log_prob = log_prob.index_put((some,), flow.tokens_log_prob(self.x[some], context))
        return log_prob.masked_fill(self.lost, torch.nan)


@overload
def decode(
    flow: Flow, z: Tensor, context: Context | None = ..., *, strategy: str | Path | Strategy = ...,
    tolerance: float | None = ..., certify: CertifyMode = ..., log_prob: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def decode(
    flow: Flow, z: Tensor, context: Context | None = ..., *, strategy: str | Path | Strategy = ...,
    tolerance: float | None = ..., certify: CertifyMode = ..., log_prob: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def decode(
    flow: Flow,
    z: Float[Tensor, "n t d"],
    context: Context | None = None,
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
    check_certify_mode("certify", certify)
    check_flag("log_prob", log_prob)
    if log_prob and flow.guidance is not None:
        raise InputValueError("log_prob=True under guidance: the flow's density is not that of guided samples")
    _check_latents("z", z, flow)
    context = flow.check_context(context, len(z))
    plan = choose(flow, strategy, len(z), tolerance=tolerance)
    result = draw(flow, plan, z, context, certify=certify, log_prob=log_prob)
    if result.outcome.has_shortfall:
        warnings.warn(str(result.outcome), stacklevel=2)
    return (result.x, result.log_prob) if log_prob else result.x


def resolve_settings(flow: Flow, settings: Settings, context: Tensor | None) -> tuple[Flow, float]:
    """Returns the view of the flow to sample, and the rate of denoising.

    Guidance of the settings takes the place of the view's own; recommended guidance does not.
    """
    give = 'SamplingSettings, "recommended" or None'
    if isinstance(settings, str):
        check_choice("settings", settings, ("recommended",))
        is_guided = flow.guidance is None and (context is not None or not flow.has_conditions)
        settings = flow.recommended if is_guided else replace(flow.recommended, guidance=None)
    check_kind("settings", settings, SamplingSettings | None, give)
    if settings is None:
        return flow, 0.0
    return flow if settings.guidance is None else flow.guided(settings.guidance), check_rate(flow, settings.denoise)


def check_log_prob(flow: Flow, log_prob: bool | None, denoise: float) -> bool:
    """Returns whether samples have densities: by default if the flow is over tokens and they are its own."""
    is_own = flow.guidance is None and not denoise
    if log_prob is None:
        return flow.image_shape is None and is_own
    check_flag("log_prob", log_prob)
    if log_prob and not is_own:
        raise InputValueError(
            "log_prob=True: guided or denoised samples are of another density than the flow's; give settings=None"
        )
    return log_prob


def warn_if_guidance_is_idle(flow: Flow, context: Tensor | None) -> None:
    """Warns the caller's caller if guidance takes the same row twice."""
    if flow.guidance is not None and context is None and flow.guidance.attn_temperature == 1:
        warnings.warn("guidance without labels or texts at attn_temperature 1 changes nothing", stacklevel=3)


def _check_latents(name: str, latents: Tensor, flow: Flow) -> None:
    check_floating(name, latents, ("N", flow.config.num_tokens, flow.config.token_channels))
    check_finite(name, latents)
