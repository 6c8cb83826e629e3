"""Loading of a flow, its guidance and denoising, and a calibration report by the options of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import jacobiflow as jf
from jacobiflow.errors import InputError, InputValueError

if TYPE_CHECKING:
    from jacobiflow.models.flow import Flow

_PLAIN_EXCLUDES = "--plain: excludes --guidance and --denoise; leave one of them out"
_RECOMMENDED = " (recommended by the model; --plain turns it off)"


def load_model(name: str, device: str, dtype: str, guidance: str = "0", offload: bool = False) -> Flow:
    """Loads the flow that the options of a command name; `--dtype tf32` is set for the whole process."""
    import torch

    device = pick_device(device)
    if dtype == "tf32":
        if not device.startswith("cuda"):
            raise InputValueError(f"--dtype tf32: only a GPU has it, and --device is {device}; give float32")
        torch.set_float32_matmul_precision("high")
        dtype = "float32"
    return jf.load(name, device, dtype, offload).guided(jf.Guidance.parse(guidance))


def pick_device(name: str) -> str:
    """Returns the device of `--device`; "auto" is a CUDA GPU if there is one, else the CPU."""
    import torch

    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def image_size(flow: Flow) -> tuple[int, int]:
    """Returns the side and the number of channels of the flow's images."""
    channels, size, _ = flow.require_images()
    return size, channels


def resolve_settings(
    flow: Flow, guidance: str | None, denoise: float | None, plain: bool, has_context: bool
) -> tuple[jf.SamplingSettings, str]:
    """Returns guidance and denoising, recommended by the model unless given, and a line that names them."""
    if plain and denoise is not None:
        raise InputValueError(_PLAIN_EXCLUDES)
    recommended = jf.SamplingSettings() if plain else flow.recommended
    value, note = resolve_guidance(flow, guidance, plain, has_context)
    settings = jf.SamplingSettings(value, recommended.denoise if denoise is None else denoise)
    if settings == recommended != jf.SamplingSettings():
        note = _RECOMMENDED
    return settings, f"settings: {settings_text(settings)}{note}"


def resolve_guidance(
    flow: Flow, guidance: str | None, plain: bool, has_context: bool
) -> tuple[jf.Guidance | None, str]:
    """Returns the guidance, recommended unless given, and a note if it needs labels or prompts that are missing."""
    if plain and guidance is not None:
        raise InputValueError(_PLAIN_EXCLUDES)
    if plain or guidance is not None:
        return flow.guided(None if guidance is None else jf.Guidance.parse(guidance)).guidance, ""
    if flow.recommended.guidance and flow.has_conditions and not has_context:
        return None, f"; the recommended guidance needs {'prompts' if flow.reads_text else 'labels'}"
    return flow.recommended.guidance, ""


def guide(flow: Flow, guidance: str | None, plain: bool, has_context: bool) -> tuple[Flow, str]:
    """Returns the flow under its guidance, recommended unless given, and a line that names the guidance."""
    value, note = resolve_guidance(flow, guidance, plain, has_context)
    if value is not None and value == flow.recommended.guidance:
        note = _RECOMMENDED
    return flow.guided(value), f"guidance: {value or 'none'}{note}"


def settings_text(settings: jf.SamplingSettings) -> str:
    """Returns the options of `jacobiflow sample` that stand for `settings`, or that there are none."""
    guidance = f"--guidance {settings.guidance} " if settings.guidance else ""
    denoise = f"--denoise {settings.denoise:g}" if settings.denoise else ""
    return (guidance + denoise).strip() or "no guidance, no denoising"


@contextmanager
def naming_errors(option: str) -> Iterator[None]:
    """Raises InputValueError with the option whose function, which the user wrote, raises an error."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputValueError(f"{option}: its function raised {type(error).__name__} ({error})") from error


def load_report(path: Path | None, flow: Flow) -> jf.CalibrationReport | None:
    """Loads the report of `--report`, if given; raises ValueError if it is of another flow."""
    if path is None:
        return None
    report = jf.CalibrationReport.load(path)
    report.check(flow)
    return report
