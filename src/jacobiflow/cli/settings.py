"""The guidance and denoising that `jacobiflow sample` draws with: as given, or else as the model recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jacobiflow.cli import options
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.settings import Guidance, SamplingSettings
from jacobiflow.guidance import in_force
from jacobiflow.storage import MANIFEST, SampleFolder
from jacobiflow.storage.begin import has_begun

_OR_RECOMMENDED = "Default: what the model recommends."
GuidanceWeight = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Weight of classifier-free guidance; 0 is off. It replaces the recommended guidance as a whole, "
        f"temperature and all. {_OR_RECOMMENDED}",
        show_default=False,
    ),
]
GuidanceOn = Annotated[
    str | None,
    typer.Option("--guidance-on", help="With --guidance: guide both (the default), only the scale, or only the shift."),
]
ConstantGuidance = Annotated[
    bool,
    typer.Option(
        "--constant-guidance", help="With --guidance: the same weight for every token, not rising along them."
    ),
]
AttnTemperature = Annotated[
    float | None,
    typer.Option(
        "--attn-temperature", help="With --guidance: attention temperature of its unconditional row, by default 1."
    ),
]
Denoise = Annotated[
    float | None,
    typer.Option(
        "--denoise", help=f"Rate of one denoising step; 0 is off, 1 the norm. {_OR_RECOMMENDED}", show_default=False
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Draw without the guidance and the denoising that the model recommends.")
]


class Given(NamedTuple):
    """What a command line says of guidance and denoising; `None` and `False` where it says nothing."""

    plain: bool
    guidance: float | None
    guidance_on: str | None
    constant_guidance: bool
    attn_temperature: float | None
    denoise: float | None

    def check(self) -> None:
        """**Raises** `ValueError` for options that exclude or need each other."""
        said = {
            f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}": name
            for name, value in zip(self._fields, self, strict=True)
            if value is not None and value is not False
        }
        others = [option for option, name in said.items() if name != "plain"]
        if self.plain and others:
            raise InputValueError(f"--plain: excludes {others[0]}; leave one of them out")
        alone = [option for option, name in said.items() if name not in ("plain", "guidance", "denoise")]
        if self.guidance is None and alone:
            raise InputValueError(f"{alone[0]}: is for guidance that is given; give --guidance, its weight, too")


def settle(flow: ImageFlow, given: Given, labelled: bool) -> tuple[SamplingSettings, str]:
    """The settings to draw with, and a line that says where they are from.

    What is not given is as the flow recommends, guidance and denoising each by itself. Guidance of a flow with classes
    is recommended for samples with labels only.
    """
    given.check()
    recommended = SamplingSettings() if given.plain else flow.recommended
    guidance, unused = recommended.guidance, ""
    if given.guidance is not None:
        guidance = options.parse_guidance(
            given.guidance, given.guidance_on or "both", given.constant_guidance,
            1.0 if given.attn_temperature is None else given.attn_temperature,
        )  # fmt: skip
    elif guidance is not None and flow.config.num_classes and not labelled:
        guidance, unused = None, "without the recommended guidance, which needs labels"
    settings = SamplingSettings(guidance, recommended.denoise if given.denoise is None else given.denoise)
    own: list[str] = []
    model: list[str] = []
    (model if given.guidance is None else own).extend(options.guidance_words(settings.guidance))
    (model if given.denoise is None else own).extend(_denoise_words(settings.denoise))
    parts = [f"given: {' '.join(own)}"] if own else []
    parts += [f"recommended: {' '.join(model)} (--plain: without)"] if model else []
    parts += [unused] if unused else []
    if not parts:
        none = not given.plain and flow.recommended == SamplingSettings()
        parts = [f"no guidance, no denoising{': the model recommends none' if none else ''}"]
    return settings, "; ".join(parts)


def settings_words(settings: SamplingSettings) -> list[str]:
    """The options that `settle` turns into `settings`, whatever the model recommends; `--plain` for none of both."""
    words = [*options.guidance_words(settings.guidance), *_denoise_words(settings.denoise)]
    return words or ["--plain"]


def guidance_words(flow: ImageFlow, guidance: Guidance | None) -> list[str]:
    """The options by which `jacobiflow sample` draws from `flow` under `guidance`."""
    words = options.guidance_words(guidance)
    return ["--guidance", "0"] if not words and flow.recommended.guidance is not None else words


def check_held(out: Path, settings: SamplingSettings) -> None:
    """**Raises** `ValueError` where the folder `out` holds samples of other settings."""
    if not (out / MANIFEST).exists():
        return
    folder = SampleFolder.open(out)
    guidance = folder.manifest.guidance
    held = SamplingSettings(None if guidance is None else Guidance(**guidance), folder.manifest.denoise)
    if has_begun(folder) and held != SamplingSettings(in_force(settings.guidance), settings.denoise):
        raise InputValueError(
            f"--out {out}: holds samples of other settings; give theirs, {' '.join(settings_words(held))}, or another "
            "folder, or --overwrite to replace them"
        )


def _denoise_words(rate: float) -> list[str]:
    return ["--denoise", f"{rate:g}"] if rate else []
