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
    if plain and (guidance is not None or denoise):
        raise InputValueError("--plain: excludes --guidance and --denoise; leave one of them out")
    recommended, note = jf.SamplingSettings() if plain else flow.recommended, ""
    value = recommended.guidance
    if guidance is not None:
        value = flow.guided(jf.Guidance.parse(guidance)).guidance
    elif value and flow.has_conditions and not has_context:
        value, note = None, f"; the recommended guidance needs {'prompts' if flow.reads_text else 'labels'}"
    settings = jf.SamplingSettings(value, recommended.denoise if denoise is None else denoise)
    if guidance is None and not denoise and settings != jf.SamplingSettings() and not note:
        note = " (recommended by the model; --plain turns it off)"
    return settings, f"settings: {settings_text(settings)}{note}"


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
