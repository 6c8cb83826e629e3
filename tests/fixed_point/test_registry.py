"""Pieces of solvers have names, and are stored under them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.fixed_point import registry
from jacobiflow.utils.serialization import decode, encode


@dataclass(frozen=True)
class Scaled(jf.Guess):
    scale: torch.Tensor

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.scale * z


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[registry.Piece]]:
    monkeypatch.setattr(registry, "_pieces", pieces := dict(registry._pieces))
    return pieces


def test_a_name_belongs_to_one_class(pieces: dict[str, type[registry.Piece]]) -> None:
    """A module may be loaded again; a class of the same name from another module is refused."""
    place = {"__module__": Scaled.__module__, "__qualname__": Scaled.__qualname__}
    again, other = (type("Scaled", (Scaled,), place | change) for change in ({}, {"__module__": "elsewhere"}))
    for cls in (Scaled, again):
        assert jf.register_piece("scaled")(cls) is registry.registered_pieces(jf.Guess)["scaled"] is cls
    assert "scaled" not in registry.registered_pieces(jf.Partition)
    with pytest.raises(ValueError, match=r"'scaled' is the name of .*Scaled; choose another"):
        jf.register_piece("scaled")(other)
    for wrong in (jf.Guidance, type("Plain", (jf.Correction,), {})):
        with pytest.raises(TypeError, match=rf"{wrong.__name__}: make it a dataclass that derives from Partition, "):
            jf.register_piece("circle")(wrong)
    with pytest.raises(ValueError, match=r"no JSON form: register its class under a name"):
        encode(other(torch.ones(1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_go_to_json_and_back(dtype: torch.dtype) -> None:
    jf.register_piece("scaled")(Scaled)
    value = encode(Scaled(torch.ones(0, 2, dtype=dtype).requires_grad_()))
    back = decode(jf.Guess, value, hook=registry.decode_piece).scale
    assert (back.shape, back.dtype) == ((0, 2), torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_wrong_entry_is_refused_by_name() -> None:
    value, shift = encode(jf.Solver()), encode(jf.MeanAffine(torch.ones(1, 2), torch.ones(1, 2)))
    changes: dict[str, dict[str, Any]] = {
        "partition: kind 'circle': give one of sequential, whole, ": {"partition": {"kind": "circle"}},
        "partition: 'edge' unknown": {"partition": {"kind": "whole", "edge": 1}},
        "guess: log_scale: not an array": {"guess": shift | {"log_scale": {**shift["shift"], "shape": [1, 3]}}},
        "guess: log_scale: Expected `Float[Tensor, 't c']`, got `Tensor`": {
            "guess": shift | {"log_scale": {**shift["shift"], "shape": [2]}}
        },
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            decode(jf.Solver, {**value, **change}, hook=registry.decode_piece)
