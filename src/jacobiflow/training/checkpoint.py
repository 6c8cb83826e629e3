"""The state of a training run in safetensors files, which cannot run code.

Each process writes the rows that only it has of sharded tensors, and the first process also the tensors that all have.
The header of a file has the number of the first row of each of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from jacobiflow.errors import InputValueError, first_line
from jacobiflow.training.processes import barrier, rank, world_size
from jacobiflow.utils.files import atomic_path

_FILE = "part-{:05}-of-{:05}.safetensors"


@torch.no_grad()
def write_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the tensors of a state to a file of each process in a folder; all processes call it."""
    num_files = world_size() if any(isinstance(x, DTensor) for x in state.values()) else 1
    if rank() < num_files:
        local = {name: _local_rows(x) for name, x in state.items() if rank() == 0 or isinstance(x, DTensor)}
        tensors = {name: rows.cpu().contiguous() for name, (rows, _) in local.items()}
        first_rows = {name: str(first) for name, (_, first) in local.items()}
        with atomic_path(folder / _FILE.format(rank() + 1, num_files)) as path:
            save_file(tensors, path, first_rows)
    barrier()  # All files are complete.


@torch.no_grad()
def read_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Copies the tensors in a folder to those of a state; every process reads the rows that it has.

    Raises:
        ValueError: If a file is missing or damaged, or the state has other tensors.
    """
    targets = {name: _local_rows(tensor) for name, tensor in state.items()}
    missing = {name: len(rows) for name, (rows, _) in targets.items()}
    with _named_errors(folder):
        for name, offset, stored in _stored(folder):
            rows, first = targets[name]
            start, stop = max(first, offset), min(first + len(rows), offset + stored.get_shape()[0])
            if start < stop:
                target, values = rows[start - first : stop - first], stored[start - offset : stop - offset]
                if (values.dtype, values.shape) != (target.dtype, target.shape) or not values.isfinite().all():
                    raise ValueError(f"{name} has another shape or dtype, or non-finite values")
                target.copy_(values)
                missing[name] -= stop - start
        if incomplete := [name for name, num in missing.items() if num]:
            raise ValueError(f"{incomplete[0]} is not complete")


def check_state(folder: Path) -> None:
    """Raises ValueError if a file of a folder is missing or damaged."""
    with _named_errors(folder):
        for name, _, stored in _stored(folder):
            if not stored[:].isfinite().all():
                raise ValueError(f"{name} has non-finite values")


def _stored(folder: Path) -> Iterator[tuple[str, int, Any]]:
    """Yields the name, the number of the first row, and the values of each tensor; slices of them are read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or [file.name for file in files] != [_FILE.format(i + 1, len(files)) for i in range(len(files))]:
        raise ValueError("a file is missing, or has another name")
    for file in files:
        with safe_open(file, "pt") as content:
            first_rows = content.metadata() or {}
            for name in content.keys():  # noqa: SIM118 - it is no mapping
                yield name, int(first_rows[name]), content.get_slice(name)


def _local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Returns the rows of a tensor that this process has, and the number of the first one."""
    if not isinstance(tensor, DTensor):
        return torch.atleast_1d(tensor), 0
    num = -(-len(tensor) // tensor.device_mesh.size())  # FSDP gives each process so many rows, while there are some.
    return tensor.to_local(), num * tensor.device_mesh.get_local_rank()


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, LookupError, ValueError) as error:
        remedy = "copy it again, or move it away to start again"
        raise InputValueError(f"{folder}: damaged, or of another flow ({first_line(error)}); {remedy}") from error
