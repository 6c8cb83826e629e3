"""Values as JSON and back: what stands for what, and what is refused with the name of the entry."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow import InputError, codec

FAULT = 404.0


@codec.family
class Shape:
    """Shapes that may be registered."""


@codec.register("square")
@dataclass(frozen=True)
class Square(Shape):
    side: float = 1.0
    name: str | None = field(default=None, metadata=codec.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        if self.side < 0:
            raise InputError(f"side {self.side}: give 0 or more")
        if self.side == FAULT:
            raise ValueError("a fault of the class")


class Pair(NamedTuple):
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


KERNEL = torch.tensor([[1.5, -2.0, 0.25]])
RECORD = Record(Square(2.0, "s"), (1, 2), 2, {3: math.inf}, {"fro": True}, Pair(5), KERNEL, (7, "x"), [{"a": None}])
VALUE: dict[str, Any] = {
    "shape": {"kind": "square", "side": 2.0, "name": "s"},
    "counts": [1, 2],
    "on": 2,
    "table": {"3": None},
    "by_norm": {"fro": True},
    "pair": {"first": 5, "second": 2},
    "kernel": {"shape": [1, 3], "float32": base64.b64encode(np.array([1.5, -2.0, 0.25], "<f4").tobytes()).decode()},
    "points": [7, "x"],
    "anything": [{"a": None}],
}


def test_what_stands_for_what() -> None:
    assert codec.encode(RECORD) == VALUE
    json.dumps(VALUE, allow_nan=False)
    assert torch.equal(codec.decode(Record, VALUE).kernel, KERNEL)
    assert codec.encode(codec.decode(Record, VALUE)) == VALUE
    assert codec.decode(Record, {**VALUE, "counts": 4}).counts == 4
    assert codec.decode(Record, {**VALUE, "counts": None}).counts is None
    # What has a default may be missing, and a field that was added to a format is left out at its default.
    assert codec.encode(Square()) == {"kind": codec.name_of(Square), "side": 1.0} == {"kind": "square", "side": 1.0}
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
    with pytest.raises(TypeError, match=r"Record: derive it from one of .*Partition.* to register it"):
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
        ({"shape": {"kind": "circle"}}, "r.shape: kind 'circle': one of square wanted"),
        ({"shape": [1]}, "r.shape: [1] is no object"),
        ({"shape": {"kind": "square", "side": -1}}, "r.shape: side -1.0: give 0 or more"),
        ({"shape": {"kind": "square", "edge": 1}}, "r.shape: 'edge' unknown"),
        ({"counts": [1, True]}, "r.counts[1]: True is no int"),
        ({"on": "shift"}, "r.on: 'shift': one of 'both', 'scale', 2 wanted"),
        ({"table": {"x": 1.0}}, "r.table: 'x' is no int"),
        ({"table": {"3": "1"}}, "r.table.3: '1' is no float"),
        ({"by_norm": {"2": True}}, "r.by_norm: '2': one of 1, fro wanted"),
        ({"pair": {"second": 2}}, "r.pair: 'first' missing"),
        ({"points": [1]}, "r.points: 1 entries, 2 wanted"),
        ({"kernel": [1.0]}, "r.kernel: not an array of float32 values"),
        ({"kernel": {"shape": [1, 2], "float32": VALUE["kernel"]["float32"]}}, "r.kernel: not an array"),
        ({"kernel": {**VALUE["kernel"], "float32": "?"}}, "r.kernel: not an array"),
        ({"kernel": {**VALUE["kernel"], "dtype": 1}}, "r.kernel: not an array"),
        ({"kernel": codec.encode(KERNEL / 0)}, "r.kernel: an array that holds a NaN or an infinity"),
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
        codec.load(path, "shape", lambda value: codec.decode(Shape, value))


def test_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps(VALUE))
    assert codec.encode(codec.load(path, "record", lambda value: codec.decode(Record, value))) == VALUE
    with pytest.raises(ValueError, match=r"record .*none\.json: cannot be read"):
        codec.load(tmp_path / "none.json", "record", dict)
    for text in ("{", "[" * 100_000, '{"first": "x"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"record .*value\.json: .*; do this"):
            codec.load(path, "record", lambda value: codec.decode(Pair, value), remedy="; do this")
