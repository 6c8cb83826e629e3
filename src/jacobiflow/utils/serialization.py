"""Conversion to JSON and back: dataclasses, tensors, and solver pieces by their registered names."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from jacobiflow.errors import InputError, InputTypeError, InputValueError
from jacobiflow.utils.checks import check_kind, check_path, format_value
from jacobiflow.utils.files import read_json, write_json

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_NUMPY_FORMATS = {"float32": "<f4", "float64": "<f8"}  # NumPy's names of the dtypes in which tensors are stored.

_pieces: dict[type, dict[str, type]] = {}  # the registered classes by their names, for each base class


def piece_base(base: type[T]) -> type[T]:
    """Class decorator: lets `register_piece` register subclasses of `base`; their JSON has the name as "kind"."""
    _pieces[base] = {}
    return base


def register_piece(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: registers a piece of a solver under a name, which JSON and the notation of strategies use.

    The class is a dataclass that derives from `Partition`, `Guess` or `Correction`.

    Raises:
        TypeError: If the class is another.
        ValueError: If the name has a space, "+" or ":", or is the name of another class.

    Example:
        >>> import dataclasses, jacobiflow as jf
        >>> @jf.register_piece("halves")
        ... @dataclasses.dataclass(frozen=True)
        ... class Halves(jf.Partition):
        ...     def stop(self, front, num_tokens):
        ...         return num_tokens // 2 if front < num_tokens // 2 else num_tokens
        >>> jf.Strategy.parse("halves", num_blocks=1, num_tokens=8).solvers[0].partition
        Halves()
    """
    check_kind("name", name, str, "the name that stands for the class")
    if not name or set(name) & set("+: "):
        raise InputValueError(
            f"name={format_value(name)}: give a name without spaces, '+' and ':', which the notation reads"
        )

    def add(cls: type[T]) -> type[T]:
        pieces = _pieces_beside(cls)
        if pieces is None or not is_dataclass(cls):
            bases = ", ".join(base.__name__ for base in _pieces)
            raise InputTypeError(f"{cls.__name__}: make it a dataclass that derives from one of {bases}")
        owner = pieces.get(name, cls)
        # A module that is loaded again registers its classes again.
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputValueError(f"{name!r} is the name of {owner.__module__}.{owner.__qualname__}; choose another")
        pieces[name] = cls
        return cls

    return add


def registered_pieces(base: type) -> Mapping[str, Any]:
    """Returns the registered subclasses of `Partition`, `Guess` or `Correction` by their names."""
    return _pieces[base]


def _pieces_beside(cls: type) -> dict[str, type] | None:
    """Returns the registered classes with the same base as `cls`; `None` if it is not a piece of a solver."""
    return next((_pieces[base] for base in cls.__mro__ if base in _pieces), None)


def encode(value: Any) -> Any:
    """Returns the JSON value that `decode` turns back into `value`; NaN becomes infinity."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return math.inf if math.isnan(value) else value
    if isinstance(value, Tensor):
        name = "float64" if value.dtype == torch.float64 else "float32"
        array = value.detach().to(getattr(torch, name)).cpu().numpy().astype(_NUMPY_FORMATS[name])
        return {"shape": list(array.shape), name: base64.b64encode(array.tobytes()).decode()}
    if is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value)
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    raise InputValueError(f"{format_value(value)} has no JSON form")


def _encode_dataclass(value: Any) -> dict[str, Any]:
    entries = {entry.name: encode(getattr(value, entry.name)) for entry in fields(value)}
    pieces = _pieces_beside(type(value))
    if pieces is None:
        return entries
    for name, cls in pieces.items():
        if cls is type(value):
            return {"kind": name, **entries}
    raise InputValueError(
        f"{format_value(value)} has no JSON form: register its class under a name (jacobiflow.register_piece)"
    )


def decode(declared: Any, value: Any, where: str = "") -> Any:
    """Returns the object of the type `declared` that `encode` turned into `value`.

    The type is a dataclass, a base of solver pieces, a tensor, or a container of these. Missing entries take their
    defaults.

    Raises:
        ValueError: If an entry is unknown, or has another type or value. The message begins with `where`.
    """
    try:
        result = msgspec.convert(value, declared, dec_hook=_decode_custom, str_keys=True)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at ")
        place = re.sub(r"[`$]\.?", "", place)  # "`$.blocks[3]`"
        raise InputValueError(": ".join(part for part in (where, place, text) if part)) from error.__cause__
    _check_names(value, result, where)
    return result


def _check_names(value: Any, result: Any, where: str) -> None:
    """Raises InputValueError if an entry is not a field of its dataclass; msgspec ignores such entries."""
    if isinstance(value, dict) and is_dataclass(result):
        names = {entry.name for entry in fields(result)}
        for name, entry in value.items():
            if name in names:
                _check_names(entry, getattr(result, name), f"{where}: {name}" if where else name)
            elif name != "kind" or _pieces_beside(type(result)) is None:
                raise InputValueError(": ".join(part for part in (where, f"{name!r} unknown") if part))
    elif isinstance(value, list) and isinstance(result, list | tuple):
        for index, pair in enumerate(zip(value, result, strict=False)):
            _check_names(*pair, f"{where}[{index}]")


def _decode_custom(declared: Any, value: Any) -> Any:
    """Decodes solver pieces and tensors, which msgspec does not know."""
    if declared is Tensor or getattr(declared, "array_type", None) is Tensor:
        return _decode_tensor(value)
    names = _pieces[declared]
    name = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        raise InputValueError(f"kind {format_value(name)}: give one of {', '.join(names)}")
    return decode(names[name], value)


def _decode_tensor(value: Any) -> Tensor:
    try:
        shape = value["shape"]
        (name,) = value.keys() - {"shape"}
        array = np.frombuffer(base64.b64decode(value[name], validate=True), _NUMPY_FORMATS[name]).reshape(shape)
        return torch.from_numpy(array.astype(name))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputValueError(f"not an array of float32 or float64 values with its shape ({error})") from error


def load(path: str | Path, what: str, parse: Callable[[Any], T], remedy: str = "") -> T:
    """Reads and parses a JSON file; a ValueError begins with `what` and the path, and ends with `remedy`."""
    check_path("path", path)
    try:
        return parse(read_json(path))
    except OSError as error:
        raise InputValueError(f"{what} {path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise InputValueError(f"{what} {path}: {error}{remedy}") from error


class JsonDocument:
    """Base of dataclasses that are stored as JSON files, with their fields and a version of the format."""

    _name: ClassVar[str]  # used in error messages
    _version: ClassVar[int] = 1
    _remedy: ClassVar[str] = ""
    _indent: ClassVar[int | None] = None

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON value that `from_json` turns back into an equal object."""
        return {"format_version": self._version, **encode(self)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`."""
        if not isinstance(value, dict) or value.get("format_version") != cls._version:
            raise InputValueError(f"not a {cls._name} of format_version {cls._version}")
        entries = {name: entry for name, entry in value.items() if name != "format_version"}
        return decode(cls, entries)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        check_path("path", path)
        write_json(path, self.to_json(), self._indent)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads JSON."""
        return load(path, cls._name, cls.from_json, cls._remedy)
