"""Loading of a flow, its guidance and denoising, and a calibration report by the options of a command."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jacobiflow as jf
from jacobiflow.cli import options
from jacobiflow.errors import InputValueError
from jacobiflow.utils.launch import local_device

if TYPE_CHECKING:
    from jacobiflow.blocks.guidance import DenoiseDtype
    from jacobiflow.models.flow import Flow


def load_model(
    name: str, device: str, dtype: str, guidance: str = "0", offload: bool = False, encode_text: str | None = None
) -> Flow:
    """Loads the flow that the options of a command name; `--dtype tf32` is set for the whole process."""
    import torch

    device = local_device(device)
    if dtype == "tf32":
        if not device.startswith("cuda"):
            raise InputValueError(f"--dtype tf32: only a GPU has it, and --device is {device}; give float32")
        torch.set_float32_matmul_precision("high")
        dtype = "float32"
    flow = jf.load(name, device, dtype, offload)
    warn_of_gpu(device, "compare a few samples with the original sampler first (jacobiflow sample --compare)")
    if encode_text is not None and isinstance(flow, jf.STARFlow):
        flow.encode_text = options.load_encoder(encode_text, flow.config)
    return flow.guided(jf.Guidance.parse(guidance))


def warn_of_gpu(device: str, check: str) -> None:
    """Warns that the package has never run on a GPU if `device` is one, and recommends a check."""
    if device.startswith("cuda"):
        message = f"--device {device}: jacobiflow has never run on a GPU; {check}, or give --device cpu"
        warnings.warn(message, stacklevel=1)


def resolve_settings(
    flow: Flow, guidance: str | None, denoise: float | None, plain: bool, has_context: bool,
    denoise_dtype: DenoiseDtype = None,
) -> tuple[jf.SamplingSettings, str]:  # fmt: skip
    """Returns guidance and denoising, recommended by the model unless given, and a line that names them."""
    if plain and (guidance is not None or denoise or denoise_dtype):
        raise InputValueError("--plain: excludes --guidance, --denoise and --denoise-dtype; leave one of them out")
    recommended, note = jf.SamplingSettings() if plain else flow.recommended_for(has_context), ""
    value = recommended.guidance if guidance is None else flow.guided(jf.Guidance.parse(guidance)).guidance
    rate = recommended.denoise if denoise is None else denoise
    if denoise_dtype and not rate:
        raise InputValueError(f"--denoise-dtype {denoise_dtype}: there is no denoising step; leave it out")
    settings = jf.SamplingSettings(value, rate, denoise_dtype or recommended.denoise_dtype)
    if guidance is None and not plain:
        if value != flow.recommended.guidance:
            note = f"; the recommended guidance needs --{'prompts' if isinstance(flow, jf.STARFlow) else 'labels'}"
        elif not denoise and settings != jf.SamplingSettings():
            note = " (recommended by the model; --plain turns it off)"
    return settings, f"settings: {settings_text(settings)}{note}"


def settings_text(settings: jf.SamplingSettings) -> str:
    """Returns the options of `jacobiflow sample` that stand for `settings`, or that there are none."""
    guidance = f"--guidance {settings.guidance} " if settings.guidance else ""
    denoise = f"--denoise {settings.denoise:g}" if settings.denoise else ""
    if settings.denoise and settings.denoise_dtype:
        denoise += f" --denoise-dtype {settings.denoise_dtype}"
    return (guidance + denoise).strip() or "no guidance, no denoising"


def has_own_guesses(strategy: str) -> bool:
    """Tells whether a strategy takes no guesses from a report: "auto", or a file."""
    return strategy.strip().lower().startswith("auto") or strategy.endswith(".json")


def load_strategy(name: str, report: Path | None, flow: Flow) -> str | jf.Strategy:
    """Returns the strategy of `--strategy`, whose guesses are those of `--report` if it is given."""
    if report is None or has_own_guesses(name):
        return name
    guesses = jf.CalibrationReport.load(report)
    guesses.check(flow)
    return jf.Strategy.parse(name, guesses)
