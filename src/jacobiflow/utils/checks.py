"""Checks of the arguments of public functions, once, at the entry.

An argument of the wrong kind is a TypeError, one of the right kind with a wrong value a ValueError. The message names
the argument, its value, and what to give. True is not a number. A NumPy scalar is one; checks return Python numbers.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import torch
from torch import Tensor

from jacobiflow.errors import InputTypeError, InputValueError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 has no arithmetic
_LONGEST = 60  # characters of a value in a message


def format_value(value: Any) -> str:
    """Returns the `repr` of a value in one line, cut if it is long; for a tensor its shape and dtype."""
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} {tuple(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def check_kind(name: str, value: Any, kinds: Any, give: str) -> None:
    """Checks that a value is an instance of `kinds`, and dense if it is a tensor; the message ends with `give`."""
    if not isinstance(value, kinds):
        raise _wrong_kind(name, value, give)
    if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided or value.is_meta):
        state = "nested" if value.is_nested else "on the meta device" if value.is_meta else "sparse"
        raise InputValueError(f"{name}={format_value(value)}, {state}: give a dense tensor with values")


def check_flag(name: str, value: Any) -> None:
    """Checks that a value is True or False."""
    check_kind(name, value, bool, "True or False")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Returns a whole number from `least` to `most` as an int."""
    give = "a positive whole number" if least == 1 else f"a whole number, at least {least}"
    number = _python(value)
    if type(number) is not int:
        raise _wrong_kind(name, value, give)
    if number < least:
        raise InputValueError(f"{name}={format_value(number)}: give {give}")
    if most is not None and number > most:
        raise InputValueError(f"{name}={format_value(number)}: the limit is {most:,}; give less")
    return number


def check_seed(seed: Any) -> int:
    """Returns a seed, from 0 to 2^63 - 1, as an int."""
    return check_count("seed", seed, 0, 2**63 - 1)


def check_number(
    name: str, value: Any, least: float = 0.0, give: str = "0 or a positive number", below: float = math.inf
) -> float:
    """Returns a finite number, at least `least` and below `below`, as an int or a float."""
    number: float = _python(value)
    if type(number) not in (int, float):
        raise _wrong_kind(name, value, give)
    if not (least <= number <= sys.float_info.max and number < below):
        raise InputValueError(f"{name}={format_value(number)}: give {give}")
    return number


def check_positive(name: str, value: Any, give: str = "a positive number") -> float:
    """Returns a finite number above 0 as an int or a float."""
    return check_number(name, value, math.ulp(0.0), give)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Returns the value if it equals one of `choices`, in kind too."""
    value = _python(value)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise InputValueError(f"{name}={format_value(value)}: give {' or '.join(map(repr, choices))}")
    return value


def check_path(name: str, value: Any) -> None:
    """Checks that a value is a path."""
    check_kind(name, value, str | PathLike, "a path")


def check_device(value: Any, here: bool = False) -> torch.device:
    """Returns a device, of its name or itself; with `here`, one that this machine has."""
    check_kind("device", value, str | torch.device, "a device, such as 'cpu' or 'cuda'")
    try:
        device = torch.device(value)
        if here:
            torch.empty(0, device=device).sum().item()  # fails where a device holds no values
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputValueError(f"device={format_value(str(value))}: no such device here; give 'cpu'") from error


def check_floating(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """Checks that a value is a floating-point tensor of a shape, in which a string stands for any positive size."""
    want = f"a torch.Tensor of floating-point numbers ({', '.join(map(str, shape))})"
    check_kind(name, value, Tensor, want)
    if value.dtype not in FLOATS:
        raise InputTypeError(f"{name}={format_value(value)}: give {want}")
    fits = value.ndim == len(shape) and all(
        have == size if isinstance(size, int) else have > 0 for have, size in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise InputValueError(f"{name}={format_value(value)}: give {want}")


def check_finite(name: str, value: Tensor) -> None:
    """Checks that all entries of a tensor are finite."""
    if not torch.isfinite(value).all():
        raise InputValueError(f"{name}={format_value(value)} holds a NaN or an infinity: give finite values")


def check_rows(name: str, value: Any, rows: int, of: str) -> None:
    """Checks that a value is a tensor with as many rows as there are `of`, such as "images"."""
    check_kind(name, value, Tensor, f"a torch.Tensor with a row for each of the {rows} {of}")
    if not value.ndim or len(value) != rows:
        raise InputValueError(f"{name}={format_value(value)}: give a row for each of the {rows} {of}")


def check_on(name: str, value: Tensor, device: torch.device) -> None:
    """Checks that a tensor is on a device."""
    if value.device != device:
        raise InputValueError(f"{name}: on {value.device}, but {device} is needed; move one of them")


def check_fields(record: Any) -> None:
    """Converts the fields of a dataclass to their declared types; TypeError if that changes the kind of a value.

    An int becomes a float, and a list a tuple, where one is declared.
    """
    cls: Any = type(record)
    for name, declared in declared_types(cls).items():
        value = getattr(record, name)
        try:
            object.__setattr__(record, name, msgspec.convert(_python(value), declared))
        except msgspec.ValidationError as error:
            words = str(declared) if get_args(declared) else declared.__name__
            raise _wrong_kind(name, value, "a value of type " + re.sub(r"[\w.]*\.(?=\w)", "", words)) from error


def convert_numbers(record: Any) -> None:
    """Replaces NumPy scalars in the fields of a dataclass, and in tuples in these, by Python numbers."""
    for entry in fields(record):
        object.__setattr__(record, entry.name, _python(getattr(record, entry.name)))


def _python(value: Any) -> Any:
    """Converts NumPy scalars, and those in a tuple, to Python's."""
    if isinstance(value, np.number):
        return value.item()
    return tuple(map(_python, value)) if type(value) is tuple else value


@functools.cache
def declared_types(cls: type) -> dict[str, Any]:
    """Returns the types of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in fields(cls)}


def _wrong_kind(name: str, value: Any, give: str) -> InputTypeError:
    return InputTypeError(f"{name}={format_value(value)} of type {type(value).__name__}: give {give}")
