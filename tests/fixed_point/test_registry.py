"""Pieces of solvers have names, and are stored under them."""

from __future__ import annotations

import re
from typing import Any

import pytest

import jacobiflow as jf
from jacobiflow.fixed_point import registry
from jacobiflow.utils.serialization import decode, encode


def test_a_name_belongs_to_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may be loaded again; a class of the same name from another module is refused."""
    monkeypatch.setattr(registry, "_pieces", dict(registry._pieces))
    again, other = (
        type("Zeros", (jf.Zeros,), {"__module__": module, "__qualname__": "Zeros"})
        for module in (jf.Zeros.__module__, "elsewhere")
    )
    assert jf.register_piece("zeros")(again) is registry.registered_pieces(jf.Guess)["zeros"] is again
    assert "zeros" not in registry.registered_pieces(jf.Partition)
    with pytest.raises(ValueError, match=r"'zeros' is the name of .*\.Zeros; choose another"):
        jf.register_piece("zeros")(other)
    for wrong in (jf.Guidance, type("Bare", (jf.Guess,), {})):
        with pytest.raises(TypeError, match=rf"{wrong.__name__}: make it a dataclass that derives from Partition or "):
            jf.register_piece("circle")(wrong)
    with pytest.raises(ValueError, match=r"no JSON form: register its class under a name"):
        encode(other())


def test_a_wrong_entry_is_refused_by_name() -> None:
    value = encode(jf.Solver())
    changes: dict[str, dict[str, Any]] = {
        "partition: kind 'circle': give one of sequential, whole, ": {"partition": {"kind": "circle"}},
        "partition: 'edge' unknown": {"partition": {"kind": "whole", "edge": 1}},
        "guess: the piece 'mean_affine' of a solver is retired; jacobiflow 0.1.0 is the last version with it": {
            "guess": {"kind": "mean_affine"}
        },
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            decode(jf.Solver, {**value, **change}, hook=registry.decode_piece)
