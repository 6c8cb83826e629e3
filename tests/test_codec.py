"""Values as JSON and back: what stands for what, and what is refused with the name of the entry."""

from __future__ import annotations

import base64
import json
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

from jacobiflow import codec
from jacobiflow.errors import InputValueError
from jacobiflow.files import json_bytes

FAULT = 404.0


@codec.family
class Shape:
    """Shapes that may be registered."""


@codec.register("square")
@dataclass(frozen=True)
class Square(Shape):
    side: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.side < 0:
            raise InputValueError(f"side {self.side}: give 0 or more")
        if self.side == FAULT:
            raise ValueError("a fault of the class")


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
    by_norm: dict[Literal[1, "fro"], bool]
    pair: Pair
    kernel: Float[Tensor, "a b"]
    points: tuple[int, str] = (0, "")
    anything: Any = None
    squares: tuple[Square, ...] = ()


KERNEL = torch.tensor([[1.5, -2.0, 0.25]])
RECORD = Record(Square(2.0, "s"), (1, 2), 2, {3: math.inf}, {"fro": True}, Pair(5), KERNEL, (7, "x"), [{"a": None}])
VALUE: dict[str, Any] = {
    "shape": {"kind": "square", "side": 2.0, "name": "s"},
    "counts": [1, 2],
    "on": 2,
    "table": {"3": math.inf},
    "by_norm": {"fro": True},
    "pair": {"first": 5, "second": 2},
    "kernel": {"shape": [1, 3], "float32": base64.b64encode(np.array([1.5, -2.0, 0.25], "<f4").tobytes()).decode()},
    "points": [7, "x"],
    "anything": [{"a": None}],
    "squares": [],
}


def test_what_stands_for_what() -> None:
    assert codec.encode(RECORD) == VALUE
    assert json.loads(json_bytes(VALUE)) == VALUE
    assert torch.equal(codec.decode(Record, VALUE).kernel, KERNEL)
    assert codec.encode(codec.decode(Record, VALUE)) == VALUE
    assert codec.encode(math.nan) == math.inf
    assert codec.decode(Record, {**VALUE, "counts": 4}).counts == 4
    assert codec.decode(Record, {**VALUE, "counts": None}).counts is None
    assert codec.encode(Square()) == {"kind": codec.name_of(Square), "side": 1.0, "name": None}
    assert codec.name_of(Square) == "square"
    assert codec.name_of(Record) is codec.name_of(Shape) is None
    assert codec.decode(Shape, {"kind": "square"}) == Square()
    assert codec.decode(Pair, {"first": 1}) == Pair(1, 2)
    assert codec.decode(float, 3) == 3.0
    assert type(codec.decode(float, 3)) is float
    assert codec.decode(Tensor, codec.encode(torch.zeros(0, 2))).shape == (0, 2)
    assert codec.encode(torch.ones(2, dtype=torch.bfloat16).requires_grad_())["shape"] == [2]


def test_a_name_belongs_to_one_class() -> None:
    """But a module may be loaded again; a class of the same name from another module is another class."""
    again = type("Square", (Square,), {"__module__": Square.__module__, "__qualname__": Square.__qualname__})
    assert codec.register("square")(again) is codec.registered(Shape)["square"] is again
    codec.register("square")(Square)
    other = type("Square", (Square,), {"__module__": "elsewhere", "__qualname__": Square.__qualname__})
    for wrong in (other, type("Circle", (Shape,), {})):
        with pytest.raises(ValueError, match=r"'square' is the name of .*Square; choose another"):
            codec.register("square")(wrong)
    with pytest.raises(TypeError, match=r"Record: derive it from one of .*Shape.* to register it"):
        codec.register("record")(Record)
    with pytest.raises(TypeError, match="Circle: make it a dataclass to register it"):
        codec.register("circle")(type("Circle", (Shape,), {}))
    with pytest.raises(ValueError, match=r"no JSON form: register its class under a name \(jacobiflow.register\)"):
        codec.encode(other())
    with pytest.raises(ValueError, match="has no JSON form"):
        codec.encode({1, 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": {"kind": "circle"}}, "r: shape: kind 'circle': give one of square"),
        ({"shape": [1]}, "r: shape: kind None: give one of square"),
        ({"shape": {"kind": "square", "side": -1}}, "r: shape: side -1.0: give 0 or more"),
        ({"shape": {"kind": "square", "edge": 1}}, "r: shape: 'edge' unknown"),
        ({"shape": {"kind": "square", "side": "1"}}, "r: shape: side: Expected `float`, got `str`"),
        ({"pair": {"first": 1, "third": 3}}, "r: pair: 'third' unknown"),
        ({"squares": [{}, {"edge": 1}]}, "r: squares[1]: 'edge' unknown"),
        ({"squares": [{}, {"side": -1}]}, "r: squares[1]: side -1.0: give 0 or more"),
        ({"counts": [1, True]}, "r: counts[1]: Expected `int`, got `bool`"),
        ({"table": {"x": 1.0}}, "r: key in table: Expected `int`, got `str`"),
        ({"pair": {"second": 2}}, "r: pair: Object missing required field `first`"),
        ({"colour": 1}, "r: 'colour' unknown"),
        ({"kernel": [1.0]}, "r: kernel: not an array of float32 or float64 values"),
        ({"kernel": {"shape": [1, 2], "float32": VALUE["kernel"]["float32"]}}, "r: kernel: not an array"),
        ({"kernel": {**VALUE["kernel"], "dtype": 1}}, "r: kernel: not an array"),
        ({"kernel": codec.encode(KERNEL / 0)}, "r: kernel: an array that holds a NaN or an infinity"),
        ({"kernel": codec.encode(KERNEL[0])}, "r: kernel: Expected `Float[Tensor, 'a b']`, got `Tensor`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        codec.decode(Record, {**VALUE, **change}, "r")


def test_a_fault_of_a_class_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps({"kind": "square", "side": FAULT}))
    with pytest.raises(ValueError, match=r"^a fault of the class$"):
        codec.load(path, "shape", partial(codec.decode, Shape))


def test_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps(VALUE))
    assert codec.encode(codec.load(path, "record", partial(codec.decode, Record))) == VALUE
    with pytest.raises(ValueError, match=r"record .*none\.json: cannot be read"):
        codec.load(tmp_path / "none.json", "record", dict)
    for text in ("{", "[" * 100_000, '{"first": "x"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"record .*value\.json: .*; do this"):
            codec.load(path, "record", partial(codec.decode, Pair), remedy="; do this")
