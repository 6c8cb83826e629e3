"""Values go to JSON and back; errors name the entry."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import InputValueError
from jacobiflow.utils import serialization


@serialization.piece_base
class Shape:
    """Shapes that may be registered."""


@serialization.register_piece("square")
@dataclass(frozen=True)
class Square(Shape):
    side: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.side < 0:
            raise InputValueError(f"side {self.side}: give 0 or more")


@dataclass(frozen=True)
class Pair:
    first: int
    second: int = 2


@dataclass(frozen=True)
class Record:
    """A field for each kind of value."""

    shape: Shape
    counts: int | tuple[int, ...] | None
    on: Literal["both", "scale", 2]
    table: Mapping[int, float]
    pair: Pair
    kernel: Float[Tensor, "a b"]
    anything: Any = None
    squares: tuple[Square, ...] = ()


KERNEL = torch.tensor([[1.5, -2.0, 0.25]])
RECORD = Record(Square(2.0, "s"), (1, 2), 2, {3: math.nan}, Pair(5), KERNEL, [{"a": None}])
VALUE: dict[str, Any] = {
    "shape": {"kind": "square", "side": 2.0, "name": "s"},
    "counts": [1, 2],
    "on": 2,
    "table": {"3": math.inf},
    "pair": {"first": 5, "second": 2},
    "kernel": {"shape": [1, 3], "float32": base64.b64encode(np.array([1.5, -2.0, 0.25], "<f4").tobytes()).decode()},
    "anything": [{"a": None}],
    "squares": [],
}


def test_values_go_to_json_and_back() -> None:
    assert serialization.encode(RECORD) == VALUE
    assert torch.equal(serialization.decode(Record, VALUE).kernel, KERNEL)
    assert serialization.encode(serialization.decode(Record, VALUE)) == VALUE
    assert serialization.decode(Shape, {"kind": "square"}) == Square()
    assert serialization.decode(Pair, {"first": 1}) == Pair(1, 2)
    assert type(serialization.decode(float, 3)) is float
    assert serialization.decode(Tensor, serialization.encode(torch.zeros(0, 2).double())).dtype == torch.float64
    assert serialization.encode(torch.ones(2, dtype=torch.bfloat16).requires_grad_())["shape"] == [2]
    with pytest.raises(ValueError, match="has no JSON form"):
        serialization.encode({1, 2})


def test_a_name_belongs_to_one_class() -> None:
    """A module may be loaded again; a class of the same name from another module is refused."""
    again = type("Square", (Square,), {"__module__": Square.__module__, "__qualname__": Square.__qualname__})
    assert serialization.register_piece("square")(again) is serialization.registered_pieces(Shape)["square"] is again
    serialization.register_piece("square")(Square)
    other = type("Square", (Square,), {"__module__": "elsewhere", "__qualname__": Square.__qualname__})
    with pytest.raises(ValueError, match=r"'square' is the name of .*Square; choose another"):
        serialization.register_piece("square")(other)
    for wrong in (Record, type("Circle", (Shape,), {})):
        with pytest.raises(TypeError, match=rf"{wrong.__name__}: make it a dataclass that derives from one of .*Shape"):
            serialization.register_piece("circle")(wrong)
    with pytest.raises(ValueError, match=r"no JSON form: register its class under a name"):
        serialization.encode(other())


def test_a_wrong_entry_is_refused_by_name() -> None:
    changes: dict[str, dict[str, Any]] = {
        "r: shape: kind 'circle': give one of square": {"shape": {"kind": "circle"}},
        "r: shape: 'edge' unknown": {"shape": {"kind": "square", "edge": 1}},
        "r: pair: Object missing required field `first`": {"pair": {"second": 2}},
        "r: squares[1]: side -1.0: give 0 or more": {"squares": [{}, {"side": -1}]},
        "r: counts[1]: Expected `int`, got `bool`": {"counts": [1, True]},
        "r: 'colour' unknown": {"colour": 1},
        "r: kernel: not an array": {"kernel": {**VALUE["kernel"], "shape": [1, 2]}},
        "r: kernel: Expected `Float[Tensor, 'a b']`, got `Tensor`": {"kernel": serialization.encode(KERNEL[0])},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            serialization.decode(Record, {**VALUE, **change}, "r")


def test_a_wrong_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(ValueError, match=r"shape .*value\.json: cannot be read"):
        serialization.load(path, "shape", dict)
    for content in (b"{", b'{"kind": "x"}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shape .*value\.json: .*; do this"):
            serialization.load(path, "shape", partial(serialization.decode, Shape), remedy="; do this")
