"""The pieces of a solver as data: kinds, names, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow import codec
from jacobiflow.solvers import Stopping

KERNEL = torch.tensor([[[0.5, -1.0], [0.25, 3.0]]])
SOLVERS = [
    jf.Solver(),
    jf.Solver(jf.Whole(), jf.Zeros(), jf.EarlyStop(), jf.Chord(KERNEL), coarse=3),
    jf.Solver(jf.Segments(2), jf.MeanAffine(KERNEL[0], KERNEL[0]), jf.MaxSweeps((5, 3)) | jf.Tolerance(0.5)),
    jf.Solver(jf.Window(8), jf.CausalLinear(KERNEL, KERNEL[0]), jf.MaxSweeps(4)),
]


def test_the_default_is_jacobi_to_a_thousandth() -> None:
    assert jf.Solver() == jf.Solver(jf.Whole(), jf.Latent(), jf.Tolerance(1e-3), jf.Plain(), 0)


@pytest.mark.parametrize("kind", [jf.Partition, jf.SlidingRun, jf.Guess, jf.Correction])
def test_a_piece_that_lacks_its_method_is_refused(kind: type) -> None:
    with pytest.raises(TypeError, match="abstract method"):
        type("Piece", (kind,), {})()


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: jf.Solver(jf.Segments(3), stopping=jf.MaxSweeps((5, 3))), r"2 sweep counts.*Segments\(count=3\)"),
        (lambda: jf.Solver(stopping=jf.MaxSweeps((5,))), "1 sweep counts.*Whole"),
        (lambda: jf.Solver(jf.Window(2), stopping=Stopping(1.0, (5, 3))), "2 sweep counts.*Window"),
        (lambda: jf.Solver(jf.Sequential(), coarse=3), "coarse=3.*Sequential.*token by token"),
        (lambda: jf.Solver(jf.Window(1), coarse=1), "coarse=1.*Window"),
        (lambda: jf.Solver(jf.Segments(4), coarse=1).check(4, 1), "coarse=1.*Segments"),
    ],
)
def test_pieces_that_do_not_go_together_are_refused(build: Callable[[], Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        build()
    jf.Solver(jf.Segments(4), coarse=1).check(8, 1)


@pytest.mark.parametrize("solver", SOLVERS, ids=range(len(SOLVERS)))
def test_a_solver_comes_back_from_json(solver: jf.Solver) -> None:
    assert codec.decode(jf.Solver, json.loads(json.dumps(codec.encode(solver), allow_nan=False))) == solver


def test_pieces_have_names() -> None:
    for base, names in (
        (jf.Partition, ["sequential", "whole", "segments", "window"]),
        (jf.Guess, ["latent", "zeros", "mean_affine", "causal_linear"]), (jf.Correction, ["plain", "chord"]),
    ):  # fmt: skip
        assert list(codec.registered(base))[: len(names)] == names
    assert codec.encode(jf.Window(8)) == {"kind": "window", "size": 8}
    assert codec.encode(jf.MaxSweeps([3, 1])) == {"atol": None, "max_sweeps": [3, 1]}  # as before there was an ebound
