"""The registered flows by their names, and loading one."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from jacobiflow.errors import CheckpointError, InputTypeError, InputValueError
from jacobiflow.models.checkpoints.folder import CONFIG, ModelFolder, check_dtype
from jacobiflow.models.flow import Flow
from jacobiflow.utils.checks import check_device, check_path, format_value

FlowType = TypeVar("FlowType", bound=type[Flow])

FLOWS: dict[str, type[Flow]] = {}
"""The registered flows by their names."""


def register_flow(flow: FlowType) -> FlowType:
    """Class decorator that registers a subclass of `Flow` under its `model_type`.

    Example:
        >>> @register_flow
        ... class Wide(jf.MAF):
        ...     model_type = "wide-maf"
    """
    if not isinstance(flow, type) or not issubclass(flow, Flow):
        raise InputTypeError(f"flow={format_value(flow)}: give a class that derives from Flow")
    name, owner = flow.model_type, FLOWS.get(flow.model_type, flow)
    # A module or a notebook's cell that runs again registers the same class again.
    if (owner.__module__, owner.__qualname__) != (flow.__module__, flow.__qualname__):
        raise InputValueError(f"model_type {name!r}: taken by {owner.__module__}.{owner.__qualname__}; give another")
    FLOWS[name] = flow
    return flow


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> Flow:
    """Loads a flow for sampling: in eval mode, its parameters without gradients.

    Args:
        name: A bundled model's name, else a local folder, else a hub id "owner/name". For a folder that has the name of
            a bundled model write "./name", or give a `Path`.
        device: The device of the weights.
        dtype: The dtype of the weights; by default as stored, with float16 and bfloat16 widened to float32.

    Raises:
        CheckpointError: If there is no such model, or its files do not fit each other.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> type(flow).__name__, flow.config.num_tokens
        ('TarFlow', 64)
    """
    check_path("name", name)
    device, dtype = check_device(device, must_exist=True), check_dtype(dtype)
    folder = ModelFolder.open(name)
    if folder.model_type not in FLOWS:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(sorted(FLOWS))}: import "
            "the module that registers another"
        )
    flow = FLOWS[folder.model_type].from_pretrained(folder.path)
    return flow.requires_grad_(False).to(device=device, dtype=dtype)
