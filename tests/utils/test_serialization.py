"""Values go to JSON and back; errors name the entry."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from jacobiflow.errors import InputValueError
from jacobiflow.utils import serialization


@dataclass(frozen=True)
class Square:
    side: float
    name: str | None = None

    def __post_init__(self) -> None:
        if self.side < 0:
            raise InputValueError(f"side {self.side}: give 0 or more")


@dataclass(frozen=True)
class Record:
    """A field for each kind of value."""

    counts: int | tuple[int, ...] | None
    on: Literal["both", "scale", 2]
    table: Mapping[int, float]
    square: Square
    anything: Any = None
    squares: tuple[Square, ...] = ()


RECORD = Record((1, 2), 2, {3: math.nan}, Square(5), [{"a": None}])
VALUE: dict[str, Any] = {
    "counts": [1, 2], "on": 2, "table": {"3": math.inf}, "square": {"side": 5.0, "name": None},
    "anything": [{"a": None}], "squares": [],
}  # fmt: skip


def test_values_go_to_json_and_back() -> None:
    assert serialization.encode(RECORD) == VALUE
    assert serialization.encode(serialization.decode(Record, VALUE)) == VALUE
    assert serialization.decode(Square, {"side": 1}) == Square(1.0, None)
    assert type(serialization.decode(float, 3)) is float


def test_a_wrong_entry_is_refused_by_name() -> None:
    changes: dict[str, dict[str, Any]] = {
        "r: square: 'edge' unknown": {"square": {"side": 1, "edge": 1}},
        "r: square: Object missing required field `side`": {"square": {"name": "s"}},
        "r: squares[1]: side -1.0: give 0 or more": {"squares": [{"side": 0}, {"side": -1}]},
        "r: squares[0]: 'edge' unknown": {"squares": [{"side": 0, "edge": 1}]},
        "r: counts[1]: Expected `int`, got `bool`": {"counts": [1, True]},
        "r: 'colour' unknown": {"colour": 1},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            serialization.decode(Record, {**VALUE, **change}, "r")


def test_a_wrong_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(ValueError, match=r"square .*value\.json: cannot be read"):
        serialization.load(path, "square", dict)
    for content in (b"{", b'{"side": "x"}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"square .*value\.json: .*; do this"):
            serialization.load(path, "square", partial(serialization.decode, Square), remedy="; do this")
