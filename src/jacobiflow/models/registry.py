"""The registered flows by their names, and loading one."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from jacobiflow.errors import CheckpointError, InputTypeError, InputValueError
from jacobiflow.models.checkpoints.folder import CONFIG, ModelFolder
from jacobiflow.models.checkpoints.tensors import resolve_dtype, widened_dtype
from jacobiflow.models.flow import Flow
from jacobiflow.utils.checks import check_device, check_flag, check_path, format_value

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


def load(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None, offload: bool = False
) -> Flow:
    """Loads a flow for sampling: in eval mode, its parameters without gradients.

    Args:
        name: A bundled model's name, else a local folder, else a hub id "owner/name". For a folder that has the name of
            a bundled model write "./name", or give a `Path`.
        device: The device of the weights.
        dtype: The dtype of the weights; by default as stored, with float16 and bfloat16 widened to float32.
        offload: Brings the weights of one block at a time to the device, see `Flow.offloaded`. For a CPU they are read
            from the files whenever a block is used; for a GPU they are in the memory of this machine, as stored.

    Raises:
        CheckpointError: If there is no such model, or its files do not fit each other.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> type(flow).__name__, flow.config.num_tokens
        ('TarFlow', 64)
    """
    check_path("name", name)
    device, dtype = check_device(device), resolve_dtype(dtype)
    check_flag("offload", offload)
    folder, kind = _open(name)
    if offload:
        stored = kind.from_folder(folder, maps=True).requires_grad_(False)
        return stored.offloaded(device, dtype or widened_dtype(stored.state_dict().values()))
    return kind.from_folder(folder, device, dtype).requires_grad_(False)


def load_shapes(name: str | Path) -> Flow:
    """Returns a flow without the values of its weights, on the meta device, under the guidance that it recommends."""
    folder, kind = _open(name)
    with torch.device("meta"):
        flow = kind(folder.config(kind.config_types))
    flow.guidance = folder.recommended.guidance
    return flow


def _open(name: str | Path) -> tuple[ModelFolder, type[Flow]]:
    """Returns the folder of a model and the class of its flow."""
    folder = ModelFolder.open(name)
    if folder.model_type not in FLOWS:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(sorted(FLOWS))}: import "
            "the module that registers another"
        )
    return folder, FLOWS[folder.model_type]
