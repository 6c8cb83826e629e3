"""The arguments of a sampling run, checked and resolved once."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.calibration import CalibrationReport
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.options import CertifyMode, SolveOptions
from jacobiflow.models.flow import Flow, check_flow, check_rate
from jacobiflow.models.labels import ContextLike, Labels
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.planner import Strategy, auto_tolerance, choose, is_auto
from jacobiflow.sampling.denoise import denoise_checked
from jacobiflow.sampling.invert import FlowSolution, invert_in_groups, log_prob_of, num_groups
from jacobiflow.sampling.result import BlockStats, Samples
from jacobiflow.sampling.sensitivity import measure_sensitivity
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_kind
from jacobiflow.utils.progress import Progress

Settings = SamplingSettings | Literal["recommended"] | None
"""Guidance and denoising: values, those that the model recommends, or neither."""


@dataclass(frozen=True)
class Outputs:
    """The quantities that are computed for each sample, beside x.

    Attributes:
        denoise: The rate of a denoising step; 0 for none.
        log_prob: Densities.
        sensitivity: The change by rounding.
        intermediates: The tokens after each block.
    """

    denoise: float = 0.0
    log_prob: bool = False
    sensitivity: bool = False
    intermediates: bool = False


@dataclass(frozen=True)
class SamplingRequest:
    """The arguments of a sampling run, checked and resolved.

    Attributes:
        flow: The flow under its guidance.
        strategy: None if "auto" is still to be planned.
        context: The context of each sample.
    """

    flow: Flow
    strategy: Strategy | None
    context: Context
    options: SolveOptions
    outputs: Outputs = Outputs()

    @classmethod
    def resolve(
        cls, flow: Flow, num: int, labels: Labels | None = None, *, context: ContextLike | None = None,
        settings: Settings = "recommended", certify: CertifyMode = True, sensitivity: bool = False,
        log_prob: bool | None = None, batch_size: int | None = None, return_intermediates: bool = False,
        strategy: str | Path | Strategy = "auto", tolerance: float | None = None,
        report: CalibrationReport | None = None, defer_auto: bool = False,
    ) -> SamplingRequest:  # fmt: skip
        """Checks the arguments of `sample`, chooses the strategy, and resolves what depends on the flow.

        With `defer_auto` the strategy "auto" is still to be planned.
        """
        check_flow(flow)
        check_flag("sensitivity", sensitivity)
        check_flag("return_intermediates", return_intermediates)
        if batch_size is not None:
            batch_size = min(check_count("batch_size", batch_size, maximum=MAX_SAMPLES), num)
        checked = flow.check_one_context(labels, context, num)
        flow, denoise = _resolve_settings(flow, settings, checked)
        if flow.guidance is not None and checked.values is None and flow.guidance.attn_temperature == 1:
            warnings.warn("guidance without labels or texts at attn_temperature 1 changes nothing", stacklevel=3)
        outputs = Outputs(denoise, _resolve_log_prob(flow, log_prob, denoise), sensitivity, return_intermediates)
        options = SolveOptions(certify=certify, batch_size=batch_size)
        plan = None
        if defer_auto and isinstance(strategy, str) and is_auto(strategy):
            auto_tolerance(strategy, tolerance, report)  # Raises an error for arguments that do not fit.
        else:
            plan = choose(flow, strategy, batch_size or num, tolerance=tolerance, report=report)
        return cls(flow, plan, checked, options, outputs)

    def __getitem__(self, rows: slice) -> SamplingRequest:
        """Returns the request for some of the samples."""
        return replace(self, context=self.context[rows])

    def run(self, latents: Tokens, progress: Progress | None = None) -> Samples:
        """Draws the samples of latents (N, T, C). They have gradients if these are enabled."""
        flow, strategy, outputs = self.flow, self.strategy, self.outputs
        assert strategy is not None
        latents, context = latents.to(flow.var.device, flow.state_dtype), self.context.to(flow.var.device)
        options = replace(self.options, tolerance=strategy.tolerance)
        batch_size = options.batch_size or len(latents)
        total = num_groups(len(latents), batch_size) * len(flow.blocks) * (1 + outputs.sensitivity)
        on_block = _BlockCounter(progress, total)
        started = time.perf_counter()
        groups, sensitivities, log_probs = list[FlowSolution](), list[Tensor](), list[Tensor]()
        for group in invert_in_groups(
            flow, strategy, latents, context, options, on_block=on_block, with_intermediates=outputs.intermediates
        ):
            groups.append(group)
            if outputs.sensitivity:
                sensitivities.append(measure_sensitivity(flow, strategy, group, options, on_block))
            if outputs.log_prob:
                log_probs.append(log_prob_of(flow, group, batch_size))
        seconds = time.perf_counter() - started

        x = torch.cat([flow.from_tokens(group.x) for group in groups])
        stats = tuple(map(BlockStats.join, zip(*(group.solutions for group in groups), strict=True)))
        steps = zip(*(group.intermediates for group in groups), strict=True)
        intermediates = [flow.from_tokens(torch.cat(tokens)) for tokens in steps]
        started = time.perf_counter()
        if outputs.denoise:
            x = denoise_checked(flow, x, context, outputs.denoise, options.batch_size or 64)
            intermediates.append(x)
        return Samples(
            x=x,
            latents=latents,
            context=context.values,
            log_prob=torch.cat(log_probs) if outputs.log_prob else None,
            stats=stats,
            residual=torch.stack([block.residual for block in stats]).amax(dim=0) if options.certify else None,
            tolerance=strategy.certified_tolerance(flow.config.num_tokens),
            intermediates=tuple(intermediates) if outputs.intermediates else None,
            seconds=seconds,
            denoise_seconds=time.perf_counter() - started,
            sensitivity=torch.cat(sensitivities) if outputs.sensitivity else None,
            dtype=flow.precision,
        )


def _resolve_settings(flow: Flow, settings: Settings, context: Context) -> tuple[Flow, float]:
    """Returns the view of the flow to sample, and the rate of denoising.

    Guidance of the settings takes the place of the view's own; recommended guidance does not.
    """
    give = 'SamplingSettings, "recommended" or None'
    if isinstance(settings, str):
        check_choice("settings", settings, ("recommended",))
        is_guided = flow.guidance is None and (context.values is not None or not flow.has_conditions)
        settings = flow.recommended if is_guided else replace(flow.recommended, guidance=None)
    check_kind("settings", settings, SamplingSettings | None, give)
    if settings is None:
        return flow, 0.0
    return flow if settings.guidance is None else flow.guided(settings.guidance), check_rate(flow, settings.denoise)


def _resolve_log_prob(flow: Flow, log_prob: bool | None, denoise: float) -> bool:
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


@dataclass
class _BlockCounter:
    """Reports one more solved block at each call."""

    progress: Progress | None
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, "sampling")
