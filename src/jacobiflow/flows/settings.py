"""How a flow is sampled: guidance, denoising, and the settings of both that a model recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import (
    check_choice,
    check_flag,
    check_kind,
    check_number,
    check_positive,
    convert_numbers,
    short,
)
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.flows.base import Extrapolation


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of every block's parameters.

    Entry t (from 0) gets `log_scale + w_t (log_scale - log_scale_uncond)`, and the same for the shift, where the
    unconditional row has no label and attention logits divided by `attn_temperature`. `w_t` is `weight`, or with
    `annealed` it is `weight * t / (T - 1)`. `on` names the parameters that are guided.

    An unconditional flow is guided too, away from itself at another temperature.

    Reference: section 3 and the guidance of the original sampler of TarFlow, arXiv 2412.06329.

    **Raises** `TypeError` for another kind of value, `ValueError` for one out of range.
    """

    weight: float
    annealed: bool = True
    on: Literal["both", "scale", "shift"] = "both"
    attn_temperature: float = 1.0

    def __post_init__(self) -> None:
        convert_numbers(self)
        check_number("guidance weight", self.weight, give="0 (off) or a positive number")
        check_flag("annealed", self.annealed)
        check_choice("guidance on", self.on, ("both", "scale", "shift"))
        check_positive("attn_temperature", self.attn_temperature)

    def extrapolation(self, z: Float[Tensor, "b t c"]) -> Extrapolation:
        """The weights of all entries of `z`, in its dtype and on its device."""
        weights = z.new_full((z.shape[1],), min(self.weight, torch.finfo(z.dtype).max))
        if self.annealed:
            weights *= torch.arange(z.shape[1], device=z.device).to(z.dtype) / max(z.shape[1] - 1, 1)
        off = torch.zeros_like(weights)
        return Extrapolation(
            off if self.on == "shift" else weights, off if self.on == "scale" else weights, self.attn_temperature
        )


@dataclass(frozen=True)
class SamplingSettings:
    """Guidance and the rate of one denoising step, as `jacobiflow.sample` takes them; by default neither.

    A flow's `recommended` is one. It is kept in the model's config.json, where it is not the default.

    **Raises** `TypeError` for another kind of value, `ValueError` for one out of range.
    """

    guidance: Guidance | None = None
    denoise: float = 0.0

    def __post_init__(self) -> None:
        convert_numbers(self)
        check_kind("guidance", self.guidance, Guidance | None, "a Guidance, such as Guidance(1.5), or None")
        check_number("denoise", self.denoise, give="0 (off) or a positive rate")

    @classmethod
    def from_json(cls, value: Any) -> SamplingSettings:
        """Inverse of `to_json`; what is left out takes its default. **Raises** `ValueError` that names the entry."""
        entries = _entries("recommended", value, cls)
        guidance = entries.get("guidance")
        if guidance is not None:
            found = _entries("guidance", guidance, Guidance)
            if "weight" not in found:
                raise InputValueError(f"guidance={short(guidance)}: give its weight")
            guidance = _made(Guidance, found)
        return _made(cls, {**entries, "guidance": guidance})

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


def _entries(name: str, value: Any, cls: type) -> Mapping[str, Any]:
    """`value`, where it is a JSON object with entries of the dataclass `cls` only."""
    known = [field.name for field in fields(cls)]
    if not isinstance(value, dict):
        raise InputValueError(f"{name}={short(value)}: give an object with {', '.join(known)}, or leave it out")
    unknown = sorted(value.keys() - set(known))
    if unknown:
        raise InputValueError(f"{name} with an unknown {unknown[0]!r}: give {', '.join(known)} only")
    return value


def _made(cls: Any, entries: Mapping[str, Any]) -> Any:
    """`cls` of the entries; in a file another kind of value is a wrong one."""
    try:
        return cls(**entries)
    except InputTypeError as error:
        raise InputValueError(str(error)) from None
