"""The state of a training run in a safetensors file, which cannot run code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from jacobiflow.errors import InputError, InputValueError, first_line
from jacobiflow.models.checkpoints.tensors import write_tensors
from jacobiflow.training.processes import rank
from jacobiflow.utils.files import atomic_path

CHECKPOINT = "checkpoint.safetensors"
FORMAT_VERSION = 1


def last_step(out: Path) -> int:
    """Returns the step of the checkpoint in the folder of a run; 0 if there is none."""
    if not (out / CHECKPOINT).exists():
        return 0
    with _open(out) as file:
        return int(file.metadata()["step"])


@torch.no_grad()
def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the whole tensors of a state on the CPU in the first process. All processes call it."""
    tensors = {}
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            tensors[name] = whole.detach().cpu().contiguous()
    return tensors


def write_checkpoint(out: Path, step: int, state: Mapping[str, Tensor]) -> None:
    """Replaces the checkpoint in the folder of a run. All processes call it.

    Raises:
        OSError: If it cannot be written; the earlier checkpoint is kept.
    """
    tensors = gather(state)
    if rank() == 0:
        with atomic_path(out / CHECKPOINT) as path:
            write_tensors(path, tensors, {"step": str(step), "format_version": str(FORMAT_VERSION)})


@torch.no_grad()
def read_checkpoint(out: Path, state: Mapping[str, Tensor]) -> None:
    """Copies the tensors of the checkpoint to those of a state. All processes call it, and shard them as the state is.

    Raises:
        InputValueError: If the file is damaged, or of another state.
    """
    with _open(out) as file:
        for name, tensor in state.items():
            stored = _read_finite(file, name)
            if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"{name} has another shape or dtype")
            if isinstance(tensor, DTensor):
                stored = distribute_tensor(stored.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(stored)


def check_checkpoint(out: Path) -> None:
    """Raises InputValueError if the checkpoint in a folder is damaged."""
    if (out / CHECKPOINT).exists():
        with _open(out) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                _read_finite(file, name)


def _read_finite(file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has non-finite values")
    return tensor


@contextmanager
def _open(out: Path) -> Iterator[Any]:
    path = out / CHECKPOINT
    try:
        with safe_open(path, "pt") as file:
            version = int((file.metadata() or {}).get("format_version", 0))  # The first checkpoints have none.
            if version > FORMAT_VERSION:
                raise InputValueError(f"{path}: format {version} is of a newer version of jacobiflow; install it")
            yield file
    except InputError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        remedy = "copy it again, or move it away to start again"
        raise InputValueError(f"{path}: damaged, or of another flow ({first_line(error)}); {remedy}") from error
