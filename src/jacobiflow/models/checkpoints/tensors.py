"""Tensors of model files: mapping them, checking them, and building a module of them."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jacobiflow.errors import CheckpointError, InputValueError, first_line
from jacobiflow.utils.checks import FLOATS, check_kind

AnyModule = TypeVar("AnyModule", bound=nn.Module)
_MAX_NAMES = 3  # Number of entries of a kind in a message.


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors in a file by name, mapped to it: their values are read when they are used."""
    try:
        return dict(sorted(load_file(file).items()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({first_line(error)}); copy it again") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors and strings to a safetensors file. Raises OSError, for example if the disk is full."""
    try:
        save_file(dict(tensors), file, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(file)) from error


def build(
    make: Callable[[Any], AnyModule], config: Any, state: dict[str, Tensor], source: str,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, maps: bool = False,
) -> AnyModule:  # fmt: skip
    """Builds a module with the values of a state dict, which must fit it, in eval mode.

    The module is made on the meta device, so that initial values cost nothing and draw no random numbers. Tensors are
    then copied one by one, and removed from `state`: the memory is that of the module and of one tensor.

    Args:
        source: The beginning of a CheckpointError.
        dtype: The dtype of the copies; by default that of the state dict, with half precision widened to float32.
        maps: Takes the tensors as they are, so that they stay mapped to their files.
    """
    with torch.device("meta"):
        module = make(config)
    dtype = dtype or widened_dtype(state.values())
    copies, flaws = dict[str, Tensor](), list[str]()
    for name in list(state):
        tensor = state.pop(name)
        if flaw := _flaw(name, tensor):
            flaws.append(flaw)
            continue
        copies[name] = tensor if maps else tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    _raise_flaws(flaws, source)
    try:
        module.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        differences = _describe_differences(module.state_dict(), copies) or first_line(error)
        raise CheckpointError(f"{source}: does not fit the config: {differences}") from None
    return module.eval()


def _describe_differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Returns how many entries are missing, unexpected or of another shape, and the first names of each."""
    groups = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items() if name in state and state[name].shape != tensor.shape
        ],
    }  # fmt: skip
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:_MAX_NAMES])}{', ...' if len(names) > _MAX_NAMES else ''})"
        for kind, names in groups.items() if names
    )  # fmt: skip


def widened_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the dtype of tensors, with half precision widened to float32."""
    dtypes = (tensor.dtype for tensor in tensors if tensor.dtype in FLOATS)  # Others are not promoted, and refused.
    return reduce(torch.promote_types, dtypes, torch.float32)


def check_values(
    state: Mapping[str, Tensor], source: str, dtypes: Sequence[torch.dtype] = FLOATS, checks_values: bool = True
) -> None:
    """Raises CheckpointError if an entry is not a dense tensor of these dtypes, or its values cannot be weights.

    If `checks_values` is False, the values are not read from the file.
    """
    flaws = (_flaw(name, tensor, dtypes, checks_values) for name, tensor in state.items())
    _raise_flaws([flaw for flaw in flaws if flaw], source)


def _flaw(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS, checks_values: bool = True) -> str:
    """Returns what is wrong with an entry, or nothing."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
        return f"{name} is not a dense tensor with values"
    if tensor.dtype not in dtypes:
        return f"{name} is of {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{name} has more values than the file stores"
    if not checks_values or not tensor.numel():
        return ""
    least, largest = (float(value) for value in tensor.aminmax())  # This makes no copy, and NaN is both.
    if not math.isfinite(least) or not math.isfinite(largest):
        return f"{name} has non-finite values"
    return f"{name} has values that are not positive" if name == "var" and least <= 0 else ""


def _raise_flaws(flaws: Sequence[str], source: str) -> None:
    if flaws:
        raise CheckpointError(f"{source}: {'; '.join(flaws)}")


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the floating-point dtype of that name, or `None`."""
    check_kind("dtype", dtype, str | torch.dtype | None, "a dtype, such as torch.float64, its name, or None")
    number = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if number is None or number in FLOATS:
        return number
    names = ", ".join(str(name).removeprefix("torch.") for name in FLOATS)
    raise InputValueError(f"give one of {names}", argument="dtype", value=repr(dtype))
