"""One JSON codec: dataclasses with their field types, tensors, and classes that are registered under a name."""

from __future__ import annotations

import base64
import functools
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from jacobiflow.checks import check_kind, check_path, short
from jacobiflow.errors import InputError, InputTypeError, InputValueError

T = TypeVar("T")
OMIT_DEFAULT = {"omit_default": True}
"""Metadata of a field that was added to a format: left out at its default, so that older files keep their bytes."""

_STORED = {"float32": "<f4", "float64": "<f8"}  # how a tensor's values are stored, by the name of its entry

_families: dict[type, dict[str, type]] = {}


def family(base: type[T]) -> type[T]:
    """Class decorator: the subclasses of `base` may be registered under a name, which their JSON carries as "kind"."""
    _families[base] = {}
    return base


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: `name` stands for this class, a dataclass, in JSON, in the notation and in the planner.

    The class derives from `Partition`, `Guess` or `Correction`.

    **Raises** `ValueError` where the name is taken, `TypeError` where the class has no such base or is no dataclass.
    """
    check_kind("name", name, str, "the name that stands for the class")
    if not name or set(name) & set("+: "):
        raise InputValueError(f"name={short(name)}: give a name without spaces, '+' and ':', which the notation reads")

    def add(cls: type[T]) -> type[T]:
        check_kind("class", cls, type, "a dataclass")
        names = _families[_base_of(cls)]
        taken = names.get(name, cls)
        # The same class once more is a module that was loaded again.
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputValueError(f"{name!r} is the name of {taken.__module__}.{taken.__qualname__}; choose another")
        if not is_dataclass(cls):
            raise InputTypeError(f"{cls.__name__}: make it a dataclass to register it")
        names[name] = cls
        return cls

    return add


def registered(base: type) -> Mapping[str, Any]:
    """The classes of a family by their names."""
    return types.MappingProxyType(_families[base])


def name_of(cls: type) -> str | None:
    """The name under which a class is registered; `None` where it is not."""
    base = next((base for base in cls.__mro__ if base in _families), None)
    return None if base is None else next((name for name, kind in _families[base].items() if kind is cls), None)


def _base_of(cls: type) -> type:
    base = next((base for base in cls.__mro__ if base in _families), None)
    if base is None:
        bases = ", ".join(base.__name__ for base in _families)
        raise InputTypeError(f"{cls.__name__}: derive it from one of {bases} to register it")
    return base


# ------------------------------------------------------------------------------------------------------------ encoding


def encode(value: Any) -> Any:
    """A JSON value that `decode` turns back into `value`.

    Tensors become their values in base64. A number that is not finite becomes null, which is read as infinity.

    **Raises** `ValueError` for an object of a family that is not registered, and for what has no JSON form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return _encode_tensor(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: encode(entry) for name, entry in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    raise InputValueError(f"{short(value)} has no JSON form")


def _encode_dataclass(value: Any) -> dict[str, Any]:
    name = name_of(type(value))
    if name is None and any(base in _families for base in type(value).__mro__):
        raise InputValueError(f"{short(value)} has no JSON form: register its class under a name (jacobiflow.register)")
    entries = {
        entry.name: encode(getattr(value, entry.name))
        for entry in fields(value)
        if not (entry.metadata.get("omit_default") and getattr(value, entry.name) == entry.default)
    }
    return entries if name is None else {"kind": name, **entries}


def _encode_tensor(values: Tensor) -> dict[str, Any]:
    name = "float64" if values.dtype == torch.float64 else "float32"
    array = values.detach().to(getattr(torch, name)).cpu().numpy().astype(_STORED[name])
    return {"shape": list(array.shape), name: base64.b64encode(array.tobytes()).decode()}


# ------------------------------------------------------------------------------------------------------------ decoding


def decode(declared: Any, value: Any, where: str = "") -> Any:
    """The object of the type `declared` that `encode` made `value` of.

    **Raises** `ValueError` that names the entry at fault (`where` is the name of the whole).
    """
    origin = get_origin(declared)
    if declared is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(declared), value, where)
    if origin is Literal:
        choices = get_args(declared)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _error(where, f"{short(value)}: one of {', '.join(map(repr, choices))} wanted")
        return value
    if declared in (bool, int, float, str):
        return _decode_scalar(declared, value, where)
    if declared is Tensor or getattr(declared, "array_type", None) is Tensor:
        return _decode_tensor(value, where)
    if origin is tuple:
        return _decode_tuple(get_args(declared), value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, inner = get_args(declared)
        items = _object(value, where).items()
        return {_decode_key(key, k, where): decode(inner, entry, f"{where}.{k}".lstrip(".")) for k, entry in items}
    if declared in _families:
        return _decode_registered(declared, value, where)
    return _decode_record(declared, value, where)


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) > 1:  # such as int | tuple[int, ...]
        kinds = tuple(kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, list)) or kinds
    return decode(kinds[0], value, where)


def _decode_scalar(declared: Any, value: Any, where: str) -> Any:
    if declared is float and value is None:
        return math.inf  # which JSON does not have
    if declared is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is declared:
        return value
    raise _error(where, f"{short(value)} is no {declared.__name__}")


def _decode_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _error(where, f"{short(value)} is no list")
    if kinds[-1] is not Ellipsis and len(kinds) != len(value):
        raise _error(where, f"{len(value)} entries, {len(kinds)} wanted")
    each = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
    return tuple(decode(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(each, value, strict=True)))


def _decode_key(declared: Any, key: str, where: str) -> Any:
    if get_origin(declared) is Literal:
        found = next((choice for choice in get_args(declared) if str(choice) == key), None)
        if found is None:
            raise _error(where, f"{short(key)}: one of {', '.join(map(str, get_args(declared)))} wanted")
        return found
    try:
        return declared(key)
    except ValueError as error:
        raise _error(where, f"{short(key)} is no {declared.__name__}") from error


def _decode_registered(base: type, value: Any, where: str) -> Any:
    kind = _object(value, where).get("kind")
    if not isinstance(kind, str) or kind not in _families[base]:
        raise _error(where, f"kind {short(kind)}: one of {', '.join(_families[base])} wanted")
    return _decode_record(_families[base][kind], value, where)


def _decode_record(cls: Any, value: Any, where: str) -> Any:
    """A dataclass or named tuple. Entries that are missing take their defaults."""
    entries, name = dict(_object(value, where)), name_of(cls)
    if name is not None and entries.pop("kind", name) != name:
        raise _error(where, f"kind {short(value['kind'])}: {name} wanted")
    hints, required = _hints(cls)
    unknown = ", ".join(map(repr, entries.keys() - hints.keys()))
    missing = ", ".join(map(repr, required - entries.keys()))
    if unknown or missing:
        raise _error(where, f"{unknown} unknown" if unknown else f"{missing} missing")
    found = {name: decode(hints[name], entry, f"{where}.{name}".lstrip(".")) for name, entry in entries.items()}
    try:
        return cls(**found)
    except InputError as error:
        raise _error(where, str(error)) from error


@functools.cache
def _hints(cls: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a record's fields, and the names of those without a default."""
    hints = get_type_hints(cls)
    if not is_dataclass(cls):
        return hints, frozenset(hints.keys() - cls._field_defaults.keys())

    def has_default(entry: Field[Any]) -> bool:
        return entry.default is not MISSING or entry.default_factory is not MISSING

    names = {entry.name: hints[entry.name] for entry in fields(cls)}
    return names, frozenset(entry.name for entry in fields(cls) if not has_default(entry))


def _decode_tensor(value: Any, where: str) -> Tensor:
    try:
        shape = value["shape"]
        (name,) = value.keys() - {"shape"}
        if name not in _STORED or not all(type(size) is int and size >= 0 for size in shape):
            raise InputValueError(f"shape {short(shape)}, entries {', '.join(value)}")
        array = np.frombuffer(base64.b64decode(value[name], validate=True), _STORED[name]).reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _error(where, f"not an array of float32 values, or float64, with its shape ({error})") from error
    if not np.isfinite(array).all():
        raise _error(where, "an array that holds a NaN or an infinity")
    return torch.from_numpy(array.astype(name))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(where, f"{short(value)} is no object")
    return value


def _error(where: str, text: str) -> InputValueError:
    return InputValueError(f"{where}: {text}" if where else text)


# --------------------------------------------------------------------------------------------------------------- files


def load(path: str | Path, what: str, from_json: Callable[[Any], T], remedy: str = "") -> T:
    """What `from_json` makes of the JSON in a file, called `what` in errors.

    **Raises** `ValueError` where the file cannot be read, holds no JSON, or `from_json` refuses it, `TypeError` where
    `path` is none.
    """
    check_path("path", path)
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputValueError(f"{what} {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputValueError(f"{what} {path}: {error}{remedy}") from error
    try:
        return from_json(value)
    except InputError as error:
        raise InputValueError(f"{what} {path}: {error}{remedy}") from error
