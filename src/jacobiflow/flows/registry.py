"""Flows by name: a registered flow can be saved, loaded, trained, and used by every command."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from jacobiflow.checks import check_device, check_kind, check_path, short
from jacobiflow.errors import CheckpointError, InputTypeError, InputValueError
from jacobiflow.flows.folder import CONFIG, ModelFolder, check_dtype
from jacobiflow.flows.image_flow import ImageFlow

Flow = TypeVar("Flow", bound=type[ImageFlow])

_FLOWS: dict[str, type[ImageFlow]] = {}


def register(flow: Flow) -> Flow:
    """Registers a subclass of `ImageFlow` under its `model_type`; a class decorator.

    Raises:
        TypeError: If `flow` is not such a class.
        ValueError: If another flow has that name.

    Example:
        >>> @register
        ... class Wide(jf.MAF):
        ...     model_type = "wide-maf"
        >>> find_flow("wide-maf") is Wide
        True
    """
    if not isinstance(flow, type) or not issubclass(flow, ImageFlow):
        raise InputTypeError(f"flow={short(flow)}: give a class that derives from ImageFlow")
    name = flow.model_type
    check_kind("model_type", name, str, "the name of the flow")
    before = _FLOWS.get(name)
    # The same class again is a module that was reloaded, or a notebook's cell.
    if before is not None and (before.__module__, before.__qualname__) != (flow.__module__, flow.__qualname__):
        raise InputValueError(
            f"model_type {name!r}: taken by {before.__module__}.{before.__qualname__}; give another name"
        )
    _FLOWS[name] = flow
    return flow


def find_flow(name: str) -> type[ImageFlow] | None:
    """Returns the flow that is registered under `name`, or `None`."""
    return _FLOWS.get(name)


def flow_names() -> tuple[str, ...]:
    """Lists the names of all registered flows."""
    return tuple(sorted(_FLOWS))


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> ImageFlow:
    """Loads a flow for sampling: in eval mode, its parameters without gradients.

    Args:
        name: A bundled model's name, else a local folder, else a hub id "owner/name". A bundled name comes before a
            folder of that name; write "./name", or give a `Path`, for the folder.
        device: Device of the flow.
        dtype: Dtype of the flow, as `torch.float64` or "float64". By default as stored, with float16 and bfloat16
            widened to float32.

    Raises:
        CheckpointError: If there is no such model, or its files do not fit each other.
        ValueError: If `dtype` is not a floating-point one, or the device is not available.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> type(flow).__name__, flow.config.num_tokens
        ('TarFlow', 64)
    """
    check_path("name", name)
    device = check_device(device, here=True)
    dtype = check_dtype(dtype)
    folder = ModelFolder.open(name)
    flow_class = find_flow(folder.model_type)
    if flow_class is None:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(flow_names())}: import "
            "the module that registers another"
        )
    return flow_class.from_folder(folder).requires_grad_(False).to(device=device, dtype=dtype)
