"""Checks of the arguments of public functions, once, at the entry.

An argument of the wrong kind is a TypeError; the right kind with a wrong value is a ValueError. The message has the
argument's name, its value, and what to give. A NumPy scalar is accepted as a number, and returned as Python's. True is
not a number.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from typing import Any, get_type_hints

import msgspec
import numpy as np
import torch
from torch import Tensor

from jacobiflow.errors import InputTypeError, InputValueError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 has no arithmetic
_MAX_LENGTH = 60  # characters of a value in a message


def format_value(value: Any) -> str:
    """Returns the `repr` of a value on one line, cut if it is long; shape and dtype of a tensor."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} {tuple(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 3]}..."


def check_kind(name: str, value: Any, kinds: Any, expected: str) -> None:
    """Checks that a value is an instance of `kinds`, which the message calls `expected`; a tensor must be dense."""
    if not isinstance(value, kinds):
        raise _wrong_kind(name, value, expected)
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta):
        raise _wrong_value(name, value, "give a dense tensor with values, neither sparse nor on the meta device")


def check_flag(name: str, value: Any) -> None:
    """Checks that a value is True or False."""
    check_kind(name, value, bool, "True or False")


def check_count(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """Returns a whole number from `minimum` to `maximum` as an int."""
    expected = "a positive whole number" if minimum == 1 else f"a whole number, at least {minimum}"
    number = _to_python(value)
    if type(number) is not int:
        raise _wrong_kind(name, value, expected)
    if number < minimum:
        raise _wrong_value(name, number, f"give {expected}")
    if maximum is not None and number > maximum:
        raise _wrong_value(name, number, f"the limit is {maximum:,}; give less")
    return number


def check_seed(seed: Any) -> int:
    """Returns a seed, from 0 to 2^63 - 1, as an int."""
    return check_count("seed", seed, 0, 2**63 - 1)


def check_number(
    name: str, value: Any, minimum: float = 0.0, expected: str = "0 or a positive number", below: float = math.inf
) -> float:
    """Returns a finite number, at least `minimum` and below `below`, as an int or a float."""
    number: float = _to_python(value)
    if type(number) not in (int, float):
        raise _wrong_kind(name, value, expected)
    if not (minimum <= number <= sys.float_info.max and number < below):
        raise _wrong_value(name, number, f"give {expected}")
    return number


def check_positive(name: str, value: Any, expected: str = "a positive number") -> float:
    """Returns a finite number above 0 as an int or a float."""
    return check_number(name, value, math.ulp(0.0), expected)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Returns the value if it equals one of `choices`, in kind too."""
    value = _to_python(value)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise _wrong_value(name, value, f"give {' or '.join(map(repr, choices))}")
    return value


def check_path(name: str, value: Any) -> None:
    """Checks that a value is a path."""
    check_kind(name, value, str | PathLike, "a path")


def check_device(value: Any) -> torch.device:
    """Returns a device of this machine, given itself or its name."""
    check_kind("device", value, str | torch.device, "a device, such as 'cpu' or 'cuda'")
    try:
        device = torch.device(value)
        torch.empty(0, device=device).sum().item()  # fails if the device cannot store values
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _wrong_value("device", str(value), "no such device here; give 'cpu'") from error


def check_floating(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """Checks that a value is a floating-point tensor of a shape; a string in `shape` stands for any positive size."""
    expected = f"a torch.Tensor of floating-point numbers ({', '.join(map(str, shape))})"
    check_kind(name, value, Tensor, expected)
    if value.dtype not in FLOATS:
        raise InputTypeError(f"give {expected}", argument=name, value=format_value(value))
    fits = value.ndim == len(shape) and all(
        have == size if isinstance(size, int) else have > 0 for have, size in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise _wrong_value(name, value, f"give {expected}")


def check_finite(name: str, value: Tensor) -> None:
    """Checks that all entries of a tensor are finite."""
    if not torch.isfinite(value).all():
        raise _wrong_value(name, value, "holds a NaN or an infinity; give finite values")


def check_rows(name: str, value: Any, num: int, what: str) -> None:
    """Checks that a value is a tensor with `num` rows, one for each of `what`, such as "images"."""
    check_kind(name, value, Tensor, f"a torch.Tensor with a row for each of the {num} {what}")
    if not value.ndim or len(value) != num:
        raise _wrong_value(name, value, f"give a row for each of the {num} {what}")


def check_fields(record: Any) -> None:
    """Converts the fields of a dataclass to their declared types: NumPy's to Python's, an int to a float, and so on.

    Raises:
        TypeError: If a value is of another kind.
    """
    cls: Any = type(record)
    types = declared_types(cls)
    for entry in fields(record):
        value = getattr(record, entry.name)
        try:
            object.__setattr__(record, entry.name, msgspec.convert(_to_python(value), types[entry.name]))
        except msgspec.ValidationError as error:
            raise _wrong_kind(entry.name, value, f"a value of type {entry.type}") from error


def _to_python(value: Any) -> Any:
    """Converts NumPy scalars, and those in a tuple, to Python's."""
    if isinstance(value, np.number):
        return value.item()
    return tuple(map(_to_python, value)) if type(value) is tuple else value


@functools.cache
def declared_types(cls: type) -> dict[str, Any]:
    """Returns the types of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in fields(cls)}


def _wrong_kind(name: str, value: Any, expected: str) -> InputTypeError:
    described = f"{format_value(value)} of type {type(value).__name__}"
    return InputTypeError(f"give {expected}", argument=name, value=described)


def _wrong_value(name: str, value: Any, message: str) -> InputValueError:
    return InputValueError(message, argument=name, value=format_value(value))
