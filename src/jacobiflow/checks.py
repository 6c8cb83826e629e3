"""What the arguments of public functions must be, checked once, at the entry.

An argument of the wrong kind is a `TypeError`, one of the right kind with a wrong value a `ValueError`. The message
says what it is, which value it has, and what to give. `True` is no number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_LONGEST = 60  # characters of a value that a message quotes


def short(value: Any) -> str:
    """`value` for a message: its `repr`, cut where it is long; of a tensor its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], give: str) -> None:
    """**Raises** `TypeError` where `value` is no instance of `kinds`; `give` says what to give instead."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name}={short(value)} of type {type(value).__name__}: give {give}")


def check_flag(name: str, value: Any) -> None:
    """**Raises** `TypeError` where `value` is neither `True` nor `False`."""
    check_kind(name, value, bool, "True or False")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """**Raises** `TypeError` where `value` is no whole number, `ValueError` where it is out of `least` .. `most`."""
    give = "a positive whole number" if least == 1 else f"a whole number, at least {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={short(value)} of type {type(value).__name__}: give {give}")
    if value < least:
        raise ValueError(f"{name}={short(value)}: give {give}")
    if most is not None and value > most:
        raise ValueError(f"{name}={short(value)}: the limit is {most:,}; give less")


def check_number(name: str, value: Any, least: float = 0.0, give: str = "0 or a positive number") -> None:
    """**Raises** `TypeError` where `value` is no number, `ValueError` where it is not finite or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={short(value)} of type {type(value).__name__}: give {give}")
    if not least <= value < math.inf:
        raise ValueError(f"{name}={short(value)}: give {give}")


def check_positive(name: str, value: Any) -> None:
    """As `check_number`, for a number above 0."""
    check_number(name, value, math.ulp(0.0), "a positive number")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """**Raises** `ValueError` where `value` is none of `choices`, in kind and value."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={short(value)}: give {', '.join(others)} or {last}" if others else
                         f"{name}={short(value)}: give {last}")  # fmt: skip


def check_floating(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """**Raises** `TypeError` where `value` is no tensor, or not one of floating-point numbers; `ValueError` where its
    shape is not `shape`, whose strings stand for any positive size.
    """
    want = f"a torch.Tensor of floating-point numbers ({', '.join(map(str, shape))})"
    check_kind(name, value, Tensor, want)
    if not value.is_floating_point():
        raise TypeError(f"{name}={short(value)}: give {want}")
    fits = value.ndim == len(shape) and all(
        have == size if isinstance(size, int) else have > 0 for have, size in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}={short(value)}: give {want}")


def check_rows(name: str, value: Any, rows: int, of: str) -> None:
    """**Raises** `TypeError` where `value` is no tensor, `ValueError` where it has not one row for each of `rows`; `of`
    says what these are.
    """
    check_kind(name, value, Tensor, f"a torch.Tensor with a row for each of the {rows} {of}")
    if not value.ndim or len(value) != rows:
        raise ValueError(f"{name}={short(value)}: give a row for each of the {rows} {of}")
