"""Flows by name: a registered flow can be saved, loaded, trained, and used by every command."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from jacobiflow.checks import check_device, check_path, short
from jacobiflow.errors import CheckpointError, InputTypeError, InputValueError
from jacobiflow.flows.folder import CONFIG, ModelFolder, check_dtype
from jacobiflow.flows.image_flow import ImageFlow

Flow = TypeVar("Flow", bound=type[ImageFlow])

FLOWS: dict[str, type[ImageFlow]] = {}
"""The registered flows by their names."""


def register(flow: Flow) -> Flow:
    """Registers a subclass of `ImageFlow` under its `model_type`; a class decorator.

    Example:
        >>> @register
        ... class Wide(jf.MAF):
        ...     model_type = "wide-maf"
    """
    if not isinstance(flow, type) or not issubclass(flow, ImageFlow):
        raise InputTypeError(f"flow={short(flow)}: give a class that derives from ImageFlow")
    name = flow.model_type
    before = FLOWS.get(name)
    # The same class again is a module that was reloaded, or a notebook's cell.
    if before is not None and (before.__module__, before.__qualname__) != (flow.__module__, flow.__qualname__):
        raise InputValueError(
            f"model_type {name!r}: taken by {before.__module__}.{before.__qualname__}; give another name"
        )
    FLOWS[name] = flow
    return flow


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> ImageFlow:
    """Loads a flow for sampling: in eval mode, its parameters without gradients.

    Args:
        name: A bundled model's name, else a local folder, else a hub id "owner/name". For a folder that has the name of
            a bundled model write "./name", or give a `Path`.
        device: Of the flow.
        dtype: Dtype of the flow, or its name. By default as stored, with float16 and bfloat16 widened to float32.

    Raises:
        CheckpointError: If there is no such model, or its files do not fit each other.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> type(flow).__name__, flow.config.num_tokens
        ('TarFlow', 64)
    """
    check_path("name", name)
    device = check_device(device, here=True)
    dtype = check_dtype(dtype)
    folder = ModelFolder.open(name)
    if folder.model_type not in FLOWS:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(sorted(FLOWS))}: import "
            "the module that registers another"
        )
    flow = FLOWS[folder.model_type].from_pretrained(folder.path)
    return flow.requires_grad_(False).to(device=device, dtype=dtype)
