"""What the arguments of public functions must be, checked once, at the entry.

An argument of the wrong kind is a `TypeError`, one of the right kind with a wrong value a `ValueError`. The message
says what it is, which value it has, and what to give. `True` is no number. A NumPy scalar is one, and a check returns
the Python number that it stands for: only that is used and recorded.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from jacobiflow.errors import InputTypeError, InputValueError

_LONGEST = 60  # characters of a value that a message quotes
_LARGEST_INT = 2**63 - 1  # that PyTorch takes


def short(value: Any) -> str:
    """`value` for a message: its `repr` in one line, cut where it is long; of a tensor its shape and dtype."""
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} {tuple(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def check_kind(name: str, value: Any, kinds: Any, give: str) -> None:
    """**Raises** `TypeError` where `value` is no instance of `kinds`; `give` says what to give instead. `ValueError`
    for a tensor without the values that PyTorch's operations need: a sparse or nested one, or one on the meta device.
    """
    if not isinstance(value, kinds):
        raise _wrong_kind(name, value, give)
    if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided or value.is_meta):
        state = "nested" if value.is_nested else "on the meta device" if value.is_meta else "sparse"
        raise InputValueError(f"{name}={short(value)}, {state}: give a dense tensor with values")


def check_flag(name: str, value: Any) -> None:
    """**Raises** `TypeError` where `value` is neither `True` nor `False`."""
    check_kind(name, value, bool, "True or False")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """The `int` that `value` is. **Raises** `TypeError` if it is no whole number, `ValueError` if it is out of `least`
    .. `most`.
    """
    give = "a positive whole number" if least == 1 else f"a whole number, at least {least}"
    number = _python(value)
    if not _fits(int, number):
        raise _wrong_kind(name, value, give)
    if number < least:
        raise InputValueError(f"{name}={short(number)}: give {give}")
    if most is not None and number > most:
        raise InputValueError(f"{name}={short(number)}: the limit is {most:,}; give less")
    return int(number)


def check_seed(seed: Any) -> int:
    """As `check_count`, for a seed: 0 .. 2^63 - 1."""
    return check_count("seed", seed, 0, _LARGEST_INT)


def check_number(name: str, value: Any, least: float = 0.0, give: str = "0 or a positive number") -> float:
    """The `int` or `float` that `value` is. **Raises** `TypeError` if it is no number, `ValueError` if it is not finite
    or below `least`.
    """
    number: float = _python(value)
    if not _fits(float, number):
        raise _wrong_kind(name, value, give)
    if not least <= number <= (_LARGEST_INT if isinstance(number, int) else sys.float_info.max):
        raise InputValueError(f"{name}={short(number)}: give {give}")
    return number


def check_positive(name: str, value: Any, give: str = "a positive number") -> float:
    """As `check_number`, for a number above 0."""
    return check_number(name, value, math.ulp(0.0), give)


def check_numbers(name: str, values: Any) -> tuple[float, ...]:
    """The numbers of a sequence. **Raises** `TypeError` if `values` is none, or an entry is no number."""
    numbers = tuple(map(_python, values)) if isinstance(values, Sequence) else ()
    if not isinstance(values, Sequence) or not all(_fits(float, number) for number in numbers):
        raise _wrong_kind(name, values, "a sequence of numbers")
    return numbers


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """The choice that `value` is. **Raises** `ValueError` if it is none of `choices`, in kind and value."""
    value = _python(value)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        raise InputValueError(f"{name}={short(value)}: give {', '.join(others)} or {last}" if others else
                         f"{name}={short(value)}: give {last}")  # fmt: skip
    return value


def check_path(name: str, value: Any) -> None:
    """**Raises** `TypeError` where `value` is no path."""
    check_kind(name, value, str | PathLike, "a path")


def check_device(value: Any, here: bool = False) -> torch.device:
    """The device that `value` means. **Raises** `TypeError` for another kind, `ValueError` for a name of none, or with
    `here` of one that this machine lacks.
    """
    check_kind("device", value, str | torch.device, "a device, such as 'cpu' or 'cuda'")
    try:
        device = torch.device(value)
        if here:
            torch.empty(0, device=device).sum().item()  # fails where a device holds no values
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputValueError(f"device={short(str(value))}: no such device here; give 'cpu'") from error


def check_floating(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """**Raises** `TypeError` where `value` is no tensor, or not one of floating-point numbers; `ValueError` where its
    shape is not `shape`, whose strings stand for any positive size.
    """
    want = f"a torch.Tensor of floating-point numbers ({', '.join(map(str, shape))})"
    check_kind(name, value, Tensor, want)
    if not value.is_floating_point():
        raise InputTypeError(f"{name}={short(value)}: give {want}")
    fits = value.ndim == len(shape) and all(
        have == size if isinstance(size, int) else have > 0 for have, size in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise InputValueError(f"{name}={short(value)}: give {want}")


def check_finite(name: str, value: Tensor) -> None:
    """**Raises** `ValueError` where an entry of the tensor is not finite."""
    if not torch.isfinite(value).all():
        raise InputValueError(f"{name}={short(value)} holds a NaN or an infinity: give finite values")


def check_rows(name: str, value: Any, rows: int, of: str) -> None:
    """**Raises** `TypeError` where `value` is no tensor, `ValueError` where it has not one row for each of `rows`; `of`
    says what these are.
    """
    check_kind(name, value, Tensor, f"a torch.Tensor with a row for each of the {rows} {of}")
    if not value.ndim or len(value) != rows:
        raise InputValueError(f"{name}={short(value)}: give a row for each of the {rows} {of}")


def check_on(name: str, value: Tensor, device: torch.device) -> None:
    """**Raises** `ValueError` where the tensor is not on `device`."""
    if value.device != device:
        raise InputValueError(f"{name}: on {value.device}, but {device} is needed; move one of them")


def check_fields(record: Any) -> None:
    """**Raises** `TypeError` where a field of a dataclass has a value that its declared type does not allow.

    Entries of tuples and mappings are checked too; an `int` is a `float`, and `True` is neither. Starts with
    `convert_numbers`.
    """
    convert_numbers(record)
    cls: Any = type(record)
    for name, declared in _declared(cls):
        value = getattr(record, name)
        if not _fits(declared, value):
            words = re.sub(r"[\w.]*\.(?=\w)", "", getattr(declared, "__name__", None) or str(declared))
            raise _wrong_kind(name, value, words if get_args(declared) else f"a value of type {words}")


def convert_numbers(record: Any) -> None:
    """Replaces NumPy scalars in the fields of a dataclass, and in tuples there, by Python numbers."""
    for entry in fields(record):
        value = getattr(record, entry.name)
        if isinstance(value, np.generic | tuple):
            object.__setattr__(record, entry.name, _python(value))


def _python(value: Any) -> Any:
    """The `int` or `float` that a number is; a tuple with its entries converted; another value as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return operator.index(value)
    if isinstance(value, Real):
        return float(value)
    return tuple(map(_python, value)) if type(value) is tuple else value


@functools.cache
def _declared(cls: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(cls)
    return tuple((entry.name, hints[entry.name]) for entry in fields(cls))


def _fits(declared: Any, value: Any) -> bool:
    origin, inner = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return any(_fits(kind, value) for kind in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is tuple:
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(each) == len(value) and all(map(_fits, each, value))
    if origin is not None and issubclass(origin, Mapping):
        key, entry = inner
        return isinstance(value, Mapping) and all(_fits(key, k) and _fits(entry, v) for k, v in value.items())
    if declared in (int, float):
        return isinstance(value, int | declared) and not isinstance(value, bool)
    kind = getattr(declared, "array_type", declared)  # of jaxtyping
    return kind is Any or isinstance(value, kind)


def _wrong_kind(name: str, value: Any, give: str) -> InputTypeError:
    return InputTypeError(f"{name}={short(value)} of type {type(value).__name__}: give {give}")
