"""The pieces of a solver as data: kinds, names, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import jacobiflow as jf
from jacobiflow.fixed_point.registry import decode_piece
from jacobiflow.utils.serialization import decode, encode

SOLVERS = [
    jf.Solver(jf.Sequential()),
    jf.Solver(jf.Whole(), jf.Bf16Sweeps(3, jf.Zeros()), jf.Stopping(ebound=1e-8)),
    jf.Solver(jf.Segments(2), jf.Zeros(), jf.Stopping((5, 3)), tolerance_factor=0.5),
    jf.Solver(jf.Window(8), stopping=jf.Stopping(4)),
]


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: jf.Solver(jf.Segments(3), stopping=jf.Stopping((5, 3))), r"2 sweep counts.*Segments\(count=3\)"),
        (lambda: jf.Solver(stopping=jf.Stopping((5,))), "1 sweep counts.*Whole"),
        (lambda: jf.Stopping(()), r"sweeps=\(\): give a number, or one for each segment"),
        (lambda: jf.Solver(jf.Segments(4)).check(8, None), r"tolerance=None: nothing .* Segments\(count=4\)"),
    ],
)
def test_pieces_that_do_not_go_together_are_refused(build: Callable[[], Any], names: str) -> None:
    with pytest.raises((TypeError, ValueError), match=names):
        build()
    jf.Solver(jf.Segments(4)).check(4, None)  # token by token
    jf.Solver(stopping=jf.Stopping(ebound=1e-8)).check(8, None)


@pytest.mark.parametrize("solver", SOLVERS, ids=range(len(SOLVERS)))
def test_a_solver_comes_back_from_json(solver: jf.Solver) -> None:
    text = json.dumps(encode(solver), allow_nan=False)
    assert len({solver, decode(jf.Solver, json.loads(text), hook=decode_piece)}) == 1
