"""Conversion of dataclasses to JSON and back, and files of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec

from jacobiflow.errors import InputError, InputValueError
from jacobiflow.utils.checks import check_path
from jacobiflow.utils.files import read_json, write_json

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Returns the JSON value that `decode` turns back into `value`; NaN becomes infinity.

    A class may have a method `to_json` of its own.
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return encode_fields(value)
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    return math.inf if isinstance(value, float) and math.isnan(value) else value


def encode_fields(record: Any) -> dict[str, Any]:
    """Returns the JSON values of the fields of a dataclass."""
    return {entry.name: encode(getattr(record, entry.name)) for entry in fields(record)}


def decode(declared: Any, value: Any, where: str = "", hook: Callable[[Any, Any], Any] | None = None) -> Any:
    """Returns the object of the type `declared` that `encode` turned into `value`.

    Args:
        declared: A dataclass, whose missing entries take their defaults, or a container.
        value: A JSON value.
        where: The beginning of error messages.
        hook: Decodes the types that msgspec does not know: a function of the type and the value.

    Raises:
        ValueError: If an entry is unknown, or has another type or value.
    """
    try:
        result = msgspec.convert(value, declared, dec_hook=hook, str_keys=True)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at ")
        place = re.sub(r"[`$]\.?", "", place)  # "`$.blocks[3]`"
        raise InputValueError(": ".join(part for part in (where, place, text) if part)) from error.__cause__
    _check_names(value, encode(result), where)
    return result


def _check_names(value: Any, known: Any, where: str) -> None:
    """Raises InputValueError if `value` has an entry that `known` has not; msgspec ignores such entries."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if name not in known:
                raise InputValueError(": ".join(part for part in (where, f"{name!r} unknown") if part))
            _check_names(entry, known[name], f"{where}: {name}" if where else name)
    elif isinstance(value, list):
        for index, pair in enumerate(zip(value, known, strict=False)):
            _check_names(*pair, f"{where}[{index}]")


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
    _hook: ClassVar[Any] = None  # that of `decode`
    _version: ClassVar[int] = 1
    _remedy: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON value that `from_json` turns back into an equal object."""
        return {"format_version": self._version, **encode_fields(self)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`."""
        if not isinstance(value, dict) or value.get("format_version") != cls._version:
            raise InputValueError(f"not a {cls._name} of format_version {cls._version}")
        entries = {name: entry for name, entry in value.items() if name != "format_version"}
        return decode(cls, entries, hook=cls._hook)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        check_path("path", path)
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads JSON."""
        return load(path, cls._name, cls.from_json, cls._remedy)
