"""The pieces of solvers by their registered names."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar

from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.utils.checks import check_kind, format_value
from jacobiflow.utils.deprecation import retired
from jacobiflow.utils.serialization import decode, encode_fields

T = TypeVar("T")


class Piece(ABC):  # noqa: B024  its subclasses have abstract methods
    """Base of `Partition` and `Guess`."""

    def to_json(self) -> dict[str, Any]:
        """Returns the registered name as "kind", and the fields."""
        kind = next((name for name, cls in _pieces.items() if cls is type(self)), None)
        if kind is None:
            raise InputValueError(
                f"{format_value(self)} has no JSON form: register its class under a name (jacobiflow.register_piece)"
            )
        return {"kind": kind} | encode_fields(self)


_pieces: dict[str, type[Piece]] = {}
_RETIRED = ("causal_linear", "chord", "mean_affine", "plain")
"""Names of pieces of earlier versions."""


def register_piece(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: registers a piece of a solver under a name, which JSON and the notation of strategies use.

    The class is a dataclass that derives from `Partition` or `Guess`. Its fields are numbers, texts, or tuples of them.

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
        >>> jf.Strategy.parse("halves", num_blocks=1).solvers[0].partition
        Halves()
    """
    check_kind("name", name, str, "the name that stands for the class")
    if not name or set(name) & set("+: "):
        raise InputValueError(
            f"name={format_value(name)}: give a name without spaces, '+' and ':', which the notation reads"
        )

    def add(cls: type[T]) -> type[T]:
        if not issubclass(cls, Piece) or not is_dataclass(cls):
            raise InputTypeError(f"{cls.__name__}: make it a dataclass that derives from Partition or Guess")
        owner = _pieces.get(name, cls)
        # A module that is loaded again registers its classes again.
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputValueError(f"{name!r} is the name of {owner.__module__}.{owner.__qualname__}; choose another")
        _pieces[name] = cls
        return cls

    return add


def registered_pieces(base: type) -> dict[str, Any]:
    """Returns the registered subclasses of `Partition` or `Guess` by their names."""
    return {name: cls for name, cls in _pieces.items() if issubclass(cls, base)}


def check_not_retired(name: Any, remedy: str = "") -> None:
    """Raises ValueError if an earlier version had a piece of this name, and none is registered under it."""
    if name in _RETIRED and name not in _pieces:
        raise InputValueError(retired(f"the piece {name!r} of a solver") + remedy)


def decode_piece(declared: Any, value: Any) -> Any:
    """Decodes a piece, as the `hook` of `jacobiflow.utils.serialization.decode`."""
    classes = registered_pieces(declared)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in classes:
        check_not_retired(kind)
        raise InputValueError(f"kind {format_value(kind)}: give one of {', '.join(classes)}")
    return decode(classes[kind], value, hook=decode_piece)
