"""Flows by name: what is registered here can be saved, loaded, trained, and used by every command."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

import torch

from jacobiflow.checks import check_device, check_kind, check_path, short
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.flows.folder import CONFIG, ModelFolder
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.weights import CheckpointError, floating

Flow = TypeVar("Flow", bound=type[ImageFlow])

_FLOWS: dict[str, type[ImageFlow]] = {}
_FIELDS = (int, float, bool, str)  # what config.json holds


def register(flow: Flow) -> Flow:
    """Register a subclass of `ImageFlow` under its `model_type`; a class decorator.

    **Raises** `ValueError` where another flow has that name, `TypeError` where its `config_type` is no dataclass of
    numbers and strings.
    """
    if not isinstance(flow, type) or not issubclass(flow, ImageFlow):
        raise InputTypeError(f"flow={short(flow)}: give a class that derives from ImageFlow")
    name, config = flow.model_type, flow.config_type
    check_kind("model_type", name, str, "the name of the flow")
    types = get_type_hints(config) if is_dataclass(config) else {}
    others = [field for field in config.__dataclass_fields__ if types[field] not in _FIELDS] if types else []
    if not types or others:
        raise InputTypeError(
            f"{flow.__name__}: config_type {config.__name__}{f' with fields {others}' if others else ''}; give a "
            "dataclass whose fields are int, float, bool or str"
        )
    before = _FLOWS.get(name)
    # The same class again is a module that was reloaded, or a notebook's cell.
    if before is not None and (before.__module__, before.__qualname__) != (flow.__module__, flow.__qualname__):
        raise InputValueError(
            f"model_type {name!r}: taken by {before.__module__}.{before.__qualname__}; give another name"
        )
    _FLOWS[name] = flow
    return flow


def find_flow(name: str) -> type[ImageFlow] | None:
    """The flow that is registered under `name`, or `None`."""
    return _FLOWS.get(name)


def flow_names() -> tuple[str, ...]:
    """The names of all registered flows, in alphabetical order."""
    return tuple(sorted(_FLOWS))


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> ImageFlow:
    """A flow ready to sample, of the class that its folder names: in eval mode, its parameters without gradients.

    **Arguments:**

    - `name`: a bundled model's name, else a local folder, else a hub id "owner/name". A bundled name comes before a
      folder of that name; write "./name", or give a `Path`, for the folder.
    - `device`: where the flow goes.
    - `dtype`: of the flow, as `torch.float64` or "float64". By default as stored, float16 and bfloat16 widened to
      float32.

    **Raises** `CheckpointError` for an unknown name or a folder that does not fit, `ValueError` for another dtype
    or a device that is not there, `TypeError` for other kinds.
    """
    check_path("name", name)
    device = check_device(device, here=True)
    check_kind("dtype", dtype, str | torch.dtype | None, "a dtype, such as torch.float64, its name, or None")
    dtype = floating(dtype)
    folder = ModelFolder.open(name)
    flow_class = find_flow(folder.model_type)
    if flow_class is None:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(flow_names())}: import "
            "the module that registers another"
        )
    return flow_class.from_folder(folder).requires_grad_(False).to(device=device, dtype=dtype)
