"""The arguments of a sampling run, checked and resolved once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.options import CertifyMode, SolveOptions
from jacobiflow.models.flow import Flow, check_flow, check_rate
from jacobiflow.models.labels import ContextLike, Labels
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.utils.checks import check_choice, check_count, check_flag, check_kind

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
    """The arguments of `sample` and `sample_to_folder`, resolved: the flow under its guidance, and the context."""

    flow: Flow
    context: Context
    options: SolveOptions
    outputs: Outputs = Outputs()

    @classmethod
    def resolve(
        cls, flow: Flow, num: int, labels: Labels | None = None, *, context: ContextLike | None = None,
        settings: Settings = "recommended", certify: CertifyMode = True, sensitivity: bool = False,
        log_prob: bool | None = None, batch_size: int | None = None, return_intermediates: bool = False,
    ) -> SamplingRequest:  # fmt: skip
        """Checks the arguments of `sample`, and resolves those that depend on the flow."""
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
        return cls(flow, checked, SolveOptions(certify=certify, batch_size=batch_size), outputs)


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
