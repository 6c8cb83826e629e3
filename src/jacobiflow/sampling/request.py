"""The arguments of a sampling run, checked and resolved once."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.options import CertifyMode, SolveOptions
from jacobiflow.models.contexts import ContextLike, Labels, labels_or_context
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.planner import Auto, Strategy, auto, resolve_strategy
from jacobiflow.sampling.denoise import denoise_checked, denoising_dtype, resolve_denoising
from jacobiflow.sampling.invert import FlowSolution, invert_in_groups, log_prob_of, num_groups
from jacobiflow.sampling.result import BlockStats, Samples
from jacobiflow.sampling.sensitivity import measure_sensitivity
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_kind
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.warn import warn_caller

Settings = SamplingSettings | Literal["recommended"] | None
"""Guidance and denoising: values, those that the model recommends, or neither."""

_IMAGES_PER_COMPARISON = 64
"""Images that are denoised in bfloat16 for each that is also denoised in float32, to measure the change."""


@dataclass(frozen=True)
class SamplingRequest:
    """The arguments of `sample`, checked and resolved for a flow.

    Attributes:
        flow: The flow under its guidance.
        context: The context of each sample.
        strategy: The solvers of the blocks, or `Auto` if they are still to be planned.
        denoising: The settings of a denoising step; its rate is 0 for none.
        log_prob: Whether densities are computed.
    """

    flow: Flow
    context: Context
    strategy: Strategy | Auto
    options: SolveOptions
    denoising: SamplingSettings
    log_prob: bool
    sensitivity: bool
    return_intermediates: bool

    @classmethod
    def resolve(
        cls, flow: Flow, num: int, labels: Labels | None = None, *, context: ContextLike | None = None,
        settings: Settings = "recommended", strategy: str | Path | Strategy = "auto", tolerance: float | None = None,
        certify: CertifyMode = True, sensitivity: bool = False, batch_size: int | None = None,
        log_prob: bool | None = None, return_intermediates: bool = False,
    ) -> SamplingRequest:  # fmt: skip
        """Checks the arguments of `sample`, and resolves what depends on the flow."""
        check_flow(flow)
        check_flag("sensitivity", sensitivity)
        check_flag("return_intermediates", return_intermediates)
        if batch_size is not None:
            batch_size = min(check_count("batch_size", batch_size, maximum=MAX_SAMPLES), num)
        checked = flow.context_kind.resolve(labels_or_context(labels, context), num)
        flow, denoising = _resolve_settings(flow, settings, checked)
        if flow.guidance is not None and checked.values is None and flow.guidance.attn_temperature == 1:
            warn_caller("guidance without labels or texts at attn_temperature 1 changes nothing")
            flow = flow.guided(None)
        options = SolveOptions(certify=certify, batch_size=batch_size)
        log_prob = _resolve_log_prob(flow, log_prob, denoising.denoise)
        resolved = resolve_strategy(strategy, flow, batch_size or num, tolerance)
        return cls(flow, checked, resolved, options, denoising, log_prob, sensitivity, return_intermediates)

    def plan(self, batch_size: int, progress: Progress | None = None) -> Strategy:
        """Returns the strategy, which "auto" plans for batches of a size."""
        if isinstance(self.strategy, Auto):
            return auto(self.flow, batch_size, self.strategy.tolerance, progress)
        return self.strategy

    def __getitem__(self, rows: slice) -> SamplingRequest:
        """Returns the request for some of the samples."""
        return replace(self, context=self.context[rows])

    def run(self, latents: Tokens, progress: Progress | None = None) -> Samples:
        """Draws the samples of latents (N, T, C). They have gradients if these are enabled."""
        flow, batch_size = self.flow, self.options.batch_size or len(latents)
        strategy = self.plan(batch_size)
        options = replace(self.options, tolerance=strategy.tolerance)
        latents, context = latents.to(flow.var.device, flow.state_dtype), self.context.to(flow.var.device)
        total = num_groups(len(latents), batch_size) * len(flow.blocks) * (1 + self.sensitivity)
        on_block = _BlockCounter(progress, total)
        started = time.perf_counter()
        groups, sensitivities, log_probs = list[FlowSolution](), list[Tensor](), list[Tensor]()
        for group in invert_in_groups(
            flow, strategy, latents, context, options, on_block=on_block, with_intermediates=self.return_intermediates
        ):
            groups.append(group)
            if self.sensitivity:
                sensitivities.append(measure_sensitivity(flow, strategy, group, options, on_block))
            if self.log_prob:
                log_probs.append(log_prob_of(flow, group, batch_size))
        seconds = time.perf_counter() - started

        x = torch.cat([flow.from_tokens(group.x) for group in groups])
        stats = tuple(map(BlockStats.join, zip(*(group.solutions for group in groups), strict=True)))
        steps = zip(*(group.intermediates for group in groups), strict=True)
        intermediates = [flow.from_tokens(torch.cat(tokens)) for tokens in steps]
        started, change = time.perf_counter(), None
        if self.denoising.denoise:
            noisy, x = x, denoise_checked(flow, x, context, self.denoising, options.batch_size or 64)
            num = len(x) // _IMAGES_PER_COMPARISON
            if num and denoising_dtype(self.denoising, x.device):
                unrounded = replace(self.denoising, denoise_dtype=None)
                differences = (x[:num] - denoise_checked(flow, noisy[:num], context[:num], unrounded, num)).abs()
                change = float(differences.nanmean()), float(differences.nan_to_num(0.0).max())
            intermediates.append(x)
        return Samples(
            x=x,
            latents=latents,
            context=context.values,
            log_prob=torch.cat(log_probs) if self.log_prob else None,
            stats=stats,
            residual=torch.stack([block.residual for block in stats]).amax(dim=0) if options.certify else None,
            tolerance=strategy.tolerance,
            intermediates=tuple(intermediates) if self.return_intermediates else None,
            seconds=seconds,
            denoise_seconds=time.perf_counter() - started,
            denoise_change=change,
            sensitivity=torch.cat(sensitivities) if self.sensitivity else None,
            dtype=flow.precision,
        )


def _resolve_settings(flow: Flow, settings: Settings, context: Context) -> tuple[Flow, SamplingSettings]:
    """Returns the view of the flow to sample, and the settings of denoising.

    Guidance of the settings takes the place of the view's own; recommended guidance does not.
    """
    give = 'SamplingSettings, "recommended" or None'
    if isinstance(settings, str):
        check_choice("settings", settings, ("recommended",))
        settings = flow.recommended_for(context.values is not None)
        if flow.guidance is not None:
            settings = replace(settings, guidance=None)
    check_kind("settings", settings, SamplingSettings | None, give)
    if settings is None:
        return flow, SamplingSettings()
    denoising = resolve_denoising(flow, settings.denoise, settings.denoise_dtype)
    return flow if settings.guidance is None else flow.guided(settings.guidance), denoising


def _resolve_log_prob(flow: Flow, log_prob: bool | None, denoise: float) -> bool:
    """Returns whether samples have densities: by default if the flow is over tokens and they are its own."""
    is_own = flow.guidance is None and not denoise
    if log_prob is None:
        return flow.image_shape is None and is_own
    check_flag("log_prob", log_prob)
    if log_prob and not is_own:
        raise InputValueError(
            "log_prob=True: guided or denoised samples are of another density than the flow's; leave it out, or sample "
            "without guidance and denoising"
        )
    return log_prob


@dataclass
class _BlockCounter:
    """Reports one more solved block at each call."""

    progress: Progress | None
    total: int
    num_solved: int = 0

    def __call__(self) -> None:
        self.num_solved += 1
        if self.progress is not None:
            self.progress(self.num_solved, self.total, "sampling")
