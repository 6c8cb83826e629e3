"""A module from its weights: every tensor is checked before any is used."""

from __future__ import annotations

import functools
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from jacobiflow.errors import InputError, InputValueError
from jacobiflow.flows.config import MOST_BLOCKS

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REGISTRATIONS = 8  # of a tensor: a module may take its parameters from another


class CheckpointError(InputValueError):
    """A model folder or file that cannot be used; the message names it, what is wrong, and what to do."""


def load_torch(path: str | Path) -> Any:
    """What `torch.save` wrote to a file, on the CPU; code in it is not run, and nothing is larger than the file.

    **Raises** `OSError` where the file cannot be read; nearly any error, as `torch.load` does, where it is broken.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > size:
                raise InputValueError(f"a file of {size:,} bytes says that it holds {unpacked:,}")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Tensor) and value.layout == torch.strided and value.nbytes > _stored(value):
            raise InputValueError(f"a tensor {tuple(value.shape)} of {_stored(value):,} bytes")
    return content


def _stored(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().nbytes()


def build(make: Callable[[], AnyModule], state: dict[str, Tensor], source: str) -> AnyModule:
    """What `make` makes, in eval mode and with exactly the tensors of `state`, which is emptied.

    Half precision becomes float32. No random numbers are drawn.

    **Raises** `CheckpointError` that names `source`, and every tensor that does not fit.
    """
    try:
        with torch.device("meta"), _at_most(_REGISTRATIONS * len(state)):
            module = make()
    except _TooManyError:
        raise CheckpointError(f"{source}: the config has more weights than the {len(state)} tensors here") from None
    except (InputError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{source}: nothing has the sizes in the config ({first_line(error)})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"{name} {shape}: missing" for name, shape in expected.items() if name not in state]
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{name} {shape}: unknown")
        elif shape != expected[name]:
            problems.append(f"{name} {shape}: expected {expected[name]}")
        elif tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{name} {tensor.dtype}, {tensor.layout}: expected dense floating-point values")
    if problems:
        raise CheckpointError(f"{source}: does not fit the config: {'; '.join(problems)}")
    check_values(state, source)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32)
    # Copied, so that no tensor stays mapped to the file or lies at an odd address; popped, to free what is copied.
    copies = {name: state.pop(name).to(dtype, copy=True, memory_format=torch.contiguous_format) for name in expected}
    module.load_state_dict(copies, assign=True)
    return module.eval()


def check_values(state: Mapping[str, Tensor], source: str) -> None:
    """**Raises** `CheckpointError` where a tensor is not finite, or the prior's variance not positive."""
    problems = [f"{name} has non-finite values" for name, tensor in state.items() if not tensor.isfinite().all()]
    if not (state["var"] > 0).all():
        problems.append("var has values that are not positive")
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many n there are in names that start with "{prefix}{n}.".

    **Raises** `ValueError` where one is left out, or there are more than 1,000.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")  # no more digits: nothing has so many
    numbers = {int(found[1]) for name in state if (found := pattern.match(name))}
    if numbers != set(range(len(numbers))):
        raise InputValueError(f"{len(numbers)} of {prefix}*, but one is numbered {max(numbers)}")
    if len(numbers) > MOST_BLOCKS:
        raise InputValueError(f"{len(numbers):,} of {prefix}*; the limit is {MOST_BLOCKS:,}")
    return len(numbers)


def floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of that name. **Raises** `ValueError` where it is not a floating-point one."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or found in _FLOATS:
        return found
    names = ", ".join(str(name).removeprefix("torch.") for name in _FLOATS)
    raise InputValueError(f"dtype={dtype!r}: give one of {names}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class _TooManyError(Exception):
    """More parameters than there can be."""


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop this thread from making modules with more than `count` parameters: a config may ask for a million blocks."""
    thread, made = threading.get_ident(), 0

    def on_parameter(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > count:
            raise _TooManyError

    hook = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        hook.remove()
