"""Strategies as data, by name, and in the notation of the GS-Jacobi paper's tables."""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, sequential
from problems import latents, make_flow
from running import put
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration.convergence import TOLERANCES, Trace
from jacobiflow.calibration.metrics import NORMS, Components, Metrics
from jacobiflow.calibration.report import GUESS_NAMES, Settings
from jacobiflow.latents import draw_latents
from jacobiflow.solvers import Given, Stopping
from jacobiflow.strategy import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

many = settings(max_examples=150, deadline=None, derandomize=True)

DEFAULT = 1e-3
JACOBI_10 = jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(10))

counts = st.integers(1, 10**6)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
mean_affines = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.builds(jf.MeanAffine, *(2 * [st.lists(
        st.lists(float32, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float32))]))
)  # fmt: skip
guesses = st.sampled_from([jf.Latent(), jf.Zeros()]) | mean_affines
solvers = st.builds(
    jf.Solver,
    st.one_of(
        st.just(jf.Sequential()), st.just(jf.Whole()), st.builds(jf.Segments, counts), st.builds(jf.Window, counts)
    ),
    guesses,
    st.one_of(
        st.builds(jf.Tolerance, st.floats(0, 1e300)),
        st.builds(jf.MaxSweeps, counts),
        st.builds(Stopping, st.floats(0, 1e300), counts),
    ),
) | st.builds(
    lambda each, guess, atol: jf.Solver(jf.Segments(len(each)), guess, Stopping(atol, tuple(each))),
    st.lists(counts, min_size=1, max_size=5),
    guesses,
    st.none() | st.floats(0, 1e300),
)
strategies = st.lists(solvers, min_size=1, max_size=5).map(lambda found: jf.Strategy(tuple(found)))


def gs_jacobi(count: int, sweeps: int) -> jf.Solver:
    return jf.Solver(jf.Segments(count), stopping=jf.MaxSweeps(sweeps))


# ---------------------------------------------------------------------------------------------------------- as data


@given(strategies)
@many
def test_json_and_back(strategy: jf.Strategy) -> None:
    text = json.dumps(strategy.to_json(), allow_nan=False)
    back = jf.Strategy.from_json(json.loads(text))
    assert back == strategy
    assert hash(back) == hash(strategy)
    assert back.to_json() == strategy.to_json()


@given(strategy=strategies, atol=st.floats(0, 10))
@many
def test_a_new_tolerance_replaces_tolerances_only(strategy: jf.Strategy, atol: float) -> None:
    for old, new in zip(strategy.solvers, strategy.with_tolerance(atol).solvers, strict=True):
        assert (new.partition, new.guess, new.correction) == (old.partition, old.guess, old.correction)
        assert new.stopping.max_sweeps == old.stopping.max_sweeps
        assert new.stopping.atol == (None if old.stopping.atol is None else atol)


def test_file_and_back(tmp_path: Path) -> None:
    strategy = jf.Strategy((jf.Solver(jf.Window(24)), gs_jacobi(8, 32)))
    strategy.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert jf.Strategy.load(tmp_path / "plan.json") == strategy
    for name in (str(tmp_path / "plan.json"), tmp_path / "plan.json"):
        assert resolve(name, 2, 100, None) == strategy


def test_a_calibrated_guess_keeps_its_bits_in_a_file(tmp_path: Path) -> None:
    """Negative zero, subnormal, smallest, largest, and what has no short decimal form; a view too."""
    values = torch.tensor([[0.0, -0.0, 1e-45, -1.1754944e-38, 3.4028235e38, 0.1, -1 / 3, 1e-10]]).reshape(4, 2)
    guess = jf.MeanAffine(values, values.T.reshape(2, 4).T)
    each = jf.Solver(jf.Segments(3), guess, jf.MaxSweeps((5, 3, 2)))
    strategy = jf.Strategy((each, jf.Solver(jf.Window(24), guess), replace(each, stopping=Stopping(1e-3, (9, 1, 1)))))
    strategy.save(tmp_path / "plan.json")
    loaded = jf.Strategy.load(tmp_path / "plan.json")
    assert loaded == strategy
    assert hash(loaded) == hash(strategy)
    assert [solver.stopping.max_sweeps for solver in loaded.solvers] == [(5, 3, 2), None, (9, 1, 1)]
    for solver in loaded.solvers:
        assert isinstance(solver.guess, jf.MeanAffine)
        for have, want in ((solver.guess.log_scale, guess.log_scale), (solver.guess.shift, guess.shift)):
            assert have.dtype == torch.float32
            assert have.numpy().tobytes() == want.contiguous().numpy().tobytes()
            have += 1  # a tensor of its own, that can be written to


def test_the_json_form_of_a_guess_and_of_counts() -> None:
    """Little-endian float32 in base64, row after row, with the shape; counts as a list."""
    guess = jf.MeanAffine(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.25], [-1.0, 0.0]]))
    value = jf.Strategy((jf.Solver(jf.Segments(2), guess, jf.MaxSweeps((7, 4))),)).to_json()
    (block,) = json.loads(json.dumps(value))["blocks"]
    assert block["stopping"] == {"atol": None, "max_sweeps": [7, 4]}
    assert block["guess"] == {
        "kind": "mean_affine",
        "log_scale": array_json([[1, 2], [3, 4]]),
        "shift": array_json([[0.5, 0.25], [-1, 0]]),
    }


def test_a_float64_guess_is_written_as_float32() -> None:
    guess = jf.MeanAffine(torch.full((2, 3), 0.1).double() / 3, torch.full((2, 3), 1 / 3).double())
    strategy = jf.Strategy((jf.Solver(guess=guess),))
    back = jf.Strategy.from_json(strategy.to_json()).solvers[0].guess
    assert back == jf.MeanAffine(guess.log_scale.float(), guess.shift.float())


def test_a_piece_without_a_json_form_is_refused() -> None:
    strategy = jf.Strategy.uniform(jf.Solver(guess=Given(torch.zeros(1, 2, 3))), 2)
    with pytest.raises(ValueError, match="Given"):
        strategy.to_json()


def array_json(values: Any) -> dict[str, Any]:
    """What stands for an array in JSON, built without the library."""
    array = np.asarray(values, "<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


GOOD = jf.Strategy(
    (
        jf.Solver(jf.Segments(4), jf.Zeros(), Stopping(1e-3, 5)),
        jf.Solver(jf.Window(3)),
        jf.Solver(jf.Segments(3), jf.MeanAffine(torch.ones(2, 2), torch.zeros(2, 2)), jf.MaxSweeps((5, 3, 2))),
    )
).to_json()
AFFINE: list[Any] = ["blocks", 2, "guess"]
COUNTED: list[Any] = ["blocks", 2, "stopping", "max_sweeps"]
WRONG: list[tuple[list[Any], Any, str]] = [
    (["format_version"], 2, "format_version"),
    (["format_version"], None, "format_version"),
    (["blocks"], [], "blocks"),
    (["blocks"], {"0": 1}, "blocks"),
    (["blocks", 1], "window", "block 1"),
    (["blocks", 1], {}, "block 1"),
    (["blocks", 0, "partition"], "whole", "block 0.*whole"),
    (["blocks", 0, "partition", "kind"], "halves", "block 0.*halves"),
    (["blocks", 0, "partition", "kind"], ["segments"], "block 0"),
    (["blocks", 0, "partition", "count"], 0, "block 0.*0"),
    (["blocks", 0, "partition", "count"], 2.5, r"block 0.*2\.5"),
    (["blocks", 0, "partition", "count"], "8", "block 0.*8"),
    (["blocks", 0, "partition", "count"], None, "block 0.*None"),
    (["blocks", 0, "partition", "length"], 8, "block 0.*length"),
    (["blocks", 1, "partition", "size"], -1, "block 1.*-1"),
    (["blocks", 1, "guess", "kind"], "ones", "block 1.*ones"),
    (["blocks", 1, "guess", "value"], 1, "block 1.*value"),
    (["blocks", 1, "correction"], None, "block 1"),
    (["blocks", 0, "stopping", "atol"], -1, "block 0.*-1"),
    (["blocks", 0, "stopping", "atol"], math.nan, "block 0.*nan"),
    (["blocks", 0, "stopping", "atol"], "small", "block 0"),
    (["blocks", 0, "stopping", "max_sweeps"], 0, "block 0.*0"),
    (["blocks", 0, "stopping", "max_sweeps"], 1.5, r"block 0.*1\.5"),
    (["blocks", 0, "stopping"], {"atol": None, "max_sweeps": None}, "block 0.*tolerance"),
    (["blocks", 0, "stopping"], [1], "block 0"),
    (["blocks", 0, "stopping", "patience"], 3, "block 0.*patience"),
    (["blocks", 0, "speed"], 3, "block 0"),
    ([*AFFINE, "log_scale", "float32"], "AAAA", "block 2"),  # three bytes
    ([*AFFINE, "log_scale", "float32"], "!" * 24, "block 2"),
    ([*AFFINE, "log_scale", "float32"], array_json(np.ones((2, 2)))["float32"][:-1], "block 2"),  # padding is missing
    ([*AFFINE, "log_scale", "float32"], array_json(np.ones((2, 2)))["float32"] + "\n", "block 2"),
    ([*AFFINE, "log_scale", "float32"], "á" * 24, "block 2"),
    ([*AFFINE, "log_scale", "float32"], "", "block 2"),
    ([*AFFINE, "log_scale", "float32"], None, "block 2"),
    ([*AFFINE, "log_scale", "float32"], [1.0, 1.0, 1.0, 1.0], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [4], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [4, 1], r"block 2.*\(4, 1\)"),
    ([*AFFINE, "log_scale", "shape"], [2, 3], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [-1, 2], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [-2, -2], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [2.0, 2], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [10**30, 2], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [2**62, 2**62], "block 2"),
    ([*AFFINE, "log_scale", "shape"], [1] * 100, "block 2"),
    ([*AFFINE, "log_scale", "shape"], "22", "block 2"),
    ([*AFFINE, "log_scale", "shape"], {}, "block 2"),
    ([*AFFINE, "log_scale", "shape"], None, "block 2"),
    ([*AFFINE, "log_scale"], {"shape": [2, 2]}, "block 2"),
    ([*AFFINE, "log_scale"], {}, "block 2"),
    ([*AFFINE, "log_scale"], array_json(np.ones((2, 3))), r"block 2.*\(2, 3\)"),
    ([*AFFINE, "log_scale"], array_json(np.ones((1, 2, 2))), r"block 2.*\(1, 2, 2\)"),
    ([*AFFINE, "log_scale"], array_json(1), "block 2"),
    ([*AFFINE, "log_scale"], array_json([[1, math.nan], [1, 1]]), "block 2.*NaN"),
    ([*AFFINE, "shift"], array_json([[1, math.inf], [1, 1]]), "block 2.*infinity"),
    ([*AFFINE, "shift"], array_json([[1, 1], [-math.inf, 1]]), "block 2.*infinity"),
    ([*AFFINE, "log_scale"], 1.5, "block 2"),
    ([*AFFINE, "log_scale"], None, "block 2"),
    ([*AFFINE, "log_scale"], "ones", "block 2"),
    ([*AFFINE, "log_scale"], [[1, 1], [1, 1]], "block 2"),
    ([*AFFINE, "shift"], 1.5, "block 2"),
    ([*AFFINE, "shift"], [[1, 1], [1, 1]], "block 2"),
    ([*AFFINE, "bias"], array_json(np.ones((2, 2))), "block 2.*bias"),
    ([*AFFINE, "log_scale", "extra"], 1, "block 2"),
    (AFFINE, {"kind": "mean_affine"}, "block 2"),
    (AFFINE, {"kind": "mean_affine", "shift": array_json(np.ones((2, 2)))}, "block 2.*log_scale"),
    (AFFINE, {"kind": array_json(np.ones((2, 2)))}, "block 2"),
    (COUNTED, [], "block 2"),
    (COUNTED, [5, 3], "block 2.*2 sweep counts"),
    (COUNTED, [5, 3, 2, 1], "block 2.*4 sweep counts"),
    (COUNTED, [5, 0, 2], "block 2.*0"),
    (COUNTED, [5, -3, 2], "block 2.*-3"),
    (COUNTED, [5, 3.5, 2], r"block 2.*3\.5"),
    (COUNTED, [5, None, 2], "block 2.*None"),
    (COUNTED, [5, [3], 2], "block 2"),
    (COUNTED, ["5", "3", "2"], "block 2"),
    (COUNTED, {"0": 5}, "block 2"),
    (COUNTED, array_json([5, 3, 2]), "block 2"),
    (["blocks", 2, "partition", "count"], 4, "block 2.*3 sweep counts"),
    (["blocks", 2, "partition"], {"kind": "whole"}, "block 2.*3 sweep counts"),
    (["blocks", 2, "partition", "count"], array_json([3, 3]), "block 2"),
    (["blocks", 1, "partition", "size"], array_json(3), "block 1"),
    (["blocks", 0, "stopping", "atol"], [0.1], "block 0"),
    (["blocks", 0, "stopping", "atol"], array_json([0.1, 0.1]), "block 0"),
    (["blocks", 0, "stopping", "atol"], array_json([]), "block 0"),
    (["blocks", 0, "stopping", "atol"], array_json([0.1]), "block 0"),
    (["blocks", 0, "stopping", "atol"], array_json(0.1), "block 0"),
]


@pytest.mark.parametrize(("path", "new", "names"), WRONG, ids=[f"{path}={new}"[:100] for path, new, _ in WRONG])
def test_malformed_json_is_a_value_error_that_names_the_place(path: list[Any], new: Any, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        jf.Strategy.from_json(put(GOOD, path, new))


PLACES: list[list[Any]] = [
    ["format_version"], ["blocks"], ["blocks", 0], ["blocks", 0, "partition"], ["blocks", 0, "partition", "kind"],
    ["blocks", 0, "partition", "count"], ["blocks", 0, "guess"], ["blocks", 0, "guess", "kind"],
    ["blocks", 0, "correction"], ["blocks", 0, "stopping"], ["blocks", 0, "stopping", "atol"],
    ["blocks", 0, "stopping", "max_sweeps"], ["blocks", 0, "partition", "extra"], ["blocks", 2], AFFINE,
    [*AFFINE, "log_scale"], [*AFFINE, "log_scale", "shape"], [*AFFINE, "log_scale", "float32"],
    [*AFFINE, "log_scale", "extra"], [*AFFINE, "shift"], COUNTED, ["blocks", 2, "partition"],
]  # fmt: skip
array_jsons = st.builds(
    lambda shape, fill: array_json(np.full(shape, fill, "<f4")),
    st.lists(st.integers(0, 3), max_size=3),
    st.floats(width=32),
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | array_jsons,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(place=st.sampled_from(PLACES), new=any_json)
@many
def test_json_of_any_kind_is_read_as_it_stands_or_refused(place: list[Any], new: Any) -> None:
    value = put(GOOD, place, new)
    try:
        strategy = jf.Strategy.from_json(value)
    except ValueError:
        return
    assert strategy.to_json() == value


@given(any_json)
@many
def test_any_json_at_all_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match="strategy"):
        jf.Strategy.from_json(value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null", b'{"format_version": 1}'])
def test_a_file_that_holds_no_strategy_is_a_value_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        jf.Strategy.load(path)


def test_a_file_that_cannot_be_read_is_a_value_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(ValueError, match=path.name):
            jf.Strategy.load(path)


# ---------------------------------------------------------------------------------------------------------- by name

NAMES: dict[str, jf.Solver] = {
    "sequential": jf.Solver(jf.Sequential(), stopping=jf.Tolerance(DEFAULT)),
    "Original": jf.Solver(jf.Sequential(), stopping=jf.Tolerance(DEFAULT)),
    "jacobi": jf.Solver(jf.Whole(), stopping=jf.Tolerance(DEFAULT)),
    "Jacobi-30": jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(30)),
    "jacobi-60": jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(60)),
    "gs-jacobi:8": jf.Solver(jf.Segments(8), stopping=jf.Tolerance(DEFAULT)),
    "gs-jacobi:8-32": gs_jacobi(8, 32),
    "GS-Jacobi:1024-1": gs_jacobi(1024, 1),
    "window:24": jf.Solver(jf.Window(24), stopping=jf.Tolerance(DEFAULT)),
    " window:24 ": jf.Solver(jf.Window(24), stopping=jf.Tolerance(DEFAULT)),
}
PAPER: dict[str, dict[int, jf.Solver]] = {
    "[7-8-32-10]": {7: gs_jacobi(8, 32)},
    "[7-1024-1-10]": {7: gs_jacobi(1024, 1)},
    "[6-1-128-10]": {6: gs_jacobi(1, 128)},
    "[0/6-8-32-10]": {0: gs_jacobi(8, 32), 6: gs_jacobi(8, 32)},
    "[0/7-256-1-10]": {0: gs_jacobi(256, 1), 7: gs_jacobi(256, 1)},
    "[0/7-256/8-1/13-10]": {0: gs_jacobi(256, 1), 7: gs_jacobi(8, 13)},
    "[0/7-16/8-10/13-10]": {0: gs_jacobi(16, 10), 7: gs_jacobi(8, 13)},
    "[7/0-8/256-13/1-10]": {0: gs_jacobi(256, 1), 7: gs_jacobi(8, 13)},
    "[0/7-16/8-12-10]": {0: gs_jacobi(16, 12), 7: gs_jacobi(8, 12)},
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert resolve(name, 8, 1024, None) == jf.Strategy((NAMES[name],) * 8)


@pytest.mark.parametrize("text", PAPER)
def test_the_paper_s_notation(text: str) -> None:
    """Stack-GS-J-Else: GS segments of J sweeps in the stacked blocks, Else sweeps in the others."""
    found = resolve(text, 8, 1024, None)
    assert found == jf.Strategy(tuple(PAPER[text].get(i, JACOBI_10) for i in range(8)))


def test_else_is_its_own_number() -> None:
    assert resolve("[0/6-8-32-20]", 8, 1024, None).solvers[3] == jf.Solver(stopping=jf.MaxSweeps(20))
    assert resolve("[0/7-256/8-1/13-6]", 8, 256, None).solvers[1] == jf.Solver(stopping=jf.MaxSweeps(6))


def test_auto_is_no_text_for_any_flow() -> None:
    with pytest.raises(ValueError, match="'auto' is planned for a flow, a device and a batch"):
        resolve("auto", 3, 16, 1e-5)


def test_a_tolerance_reaches_names_and_strategies_that_have_one() -> None:
    assert resolve("window:3", 2, 16, 0.0).solvers[1].stopping == jf.Tolerance(0)
    given_ = jf.Strategy(
        (jf.Solver(stopping=jf.Tolerance(0.5)), jf.Solver(stopping=jf.Tolerance(0.5) | jf.MaxSweeps(3)))
    )
    assert resolve(given_, 2, 16, None) == given_
    assert [solver.stopping for solver in resolve(given_, 2, 16, 1e-6).solvers] == [Stopping(1e-6), Stopping(1e-6, 3)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "unknown"),
        ("newton", "newton"),
        ("jacobi-", "jacobi-"),
        ("jacobi-0", "0"),
        ("jacobi--3", "jacobi--3"),
        ("jacobi-1.5", "jacobi-1.5"),
        ("gs-jacobi:", "gs-jacobi:"),
        ("gs-jacobi:0", "0"),
        ("gs-jacobi:17", "17.*16"),
        ("window:0", "0"),
        ("window:-1", "window:-1"),
        ("[7-8-32]", "four fields"),
        ("[7-8-32-10", "four fields"),
        ("7-8-32-10", "unknown"),
        ("[]", "four fields"),
        ("[7-8-32-10-1]", "four fields"),
        ("[x-8-32-10]", "Stack 'x'"),
        ("[7-x-32-10]", "GS 'x'"),
        ("[7-8-x-10]", "J 'x'"),
        ("[7-8-32-x]", "Else 'x'"),
        ("[7-8-32-1/2]", "Else"),
        ("[8-8-32-10]", "block 8"),
        ("[0/0-8-32-10]", "twice"),
        ("[0/7-1/2/3-32-10]", "GS '1/2/3'"),
        ("[0/7-8-1/2/3-10]", "J '1/2/3'"),
        ("[7-0-32-10]", "0"),
        ("[7-8-0-10]", "0"),
        ("[7-8-32-0]", "0"),
        ("[7-17-1-10]", "17.*16"),
        ("[7/-8-32-10]", "Stack '7/'"),
    ],
)
def test_text_that_is_no_strategy_is_a_value_error_that_quotes_it(text: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        resolve(text, 8, 16, None)


def test_a_strategy_for_another_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3.*8"):
        resolve(jf.Strategy.uniform(jf.Solver(), 3), 8, 16, None)


# ------------------------------------------------------------------------------------------------ to text, and back

TABLES: dict[int, str] = {
    1024: """Jacobi-30 Jacobi-60 [6-1024-1-8] [6-1024-1-10] [6-1024-1-20] [6-1-128-10] [6-2-64-10] [6-4-32-10]
        [6-8-16-10] [6-1-256-10] [6-2-128-10] [6-4-64-10] [6-8-32-10] [6-16-16-10] [0/6-1024-1-10] [0/6-1024-1-20]
        [0/6-1024-1-30] [0/6-2-64-20] [0/6-4-32-20] [0/6-8-16-20] [0/6-16-8-20] [0/6-2-128-20] [0/6-4-64-20]
        [0/6-8-32-20] [0/6-16-16-20] [0/6-32-8-20] [7-1024-1-10] [7-1024-1-20] [7-1024-1-30] [7-1-128-10] [7-2-64-10]
        [7-4-32-10] [7-8-16-10] [7-1-256-10] [7-2-128-10] [7-4-64-10] [7-8-32-10] [7-16-16-10]""",
    256: """[0/7-256-1-6] [0/7-256-1-8] [0/7-256-1-10] [0/7-256/1-1/64-6] [0/7-256/2-1/32-6] [0/7-256/4-1/16-6]
        [0/7-256/8-1/8-6] [0/7-256/4-1/24-6] [0/7-256/8-1/13-6] [0/7-16/8-8/13-6] [0/7-16/8-10/13-6]
        [0/7-16/8-12/13-6]""",
}  # every one of Tables 3 and 4 of the paper, by T; the flows have 8 blocks


@pytest.mark.parametrize(("text", "length"), [(text, t) for t, texts in TABLES.items() for text in texts.split()])
def test_the_notations_of_the_paper_s_tables(text: str, length: int) -> None:
    """Section 3.4: stacked blocks get GS segments of at most J sweeps, the others at most Else; printed as they are."""
    found = jf.Strategy.parse(text, num_blocks=8, num_tokens=length)
    if text.startswith("["):
        stack, segments, sweeps, other = (list(map(int, field.split("/"))) for field in text.strip("[]").split("-"))
        want = [jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(other[0]))] * 8
        for i, block in enumerate(stack):
            want[block] = gs_jacobi(segments[i % len(segments)], sweeps[i % len(sweeps)])
    else:
        want = [jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(int(text.split("-")[1])))] * 8
    assert found == jf.Strategy(tuple(want))
    assert str(found) == text
    assert jf.Strategy.parse(f" {text}\n", num_blocks=8, num_tokens=length) == found


@pytest.mark.parametrize("text", ["Original", "original", "ORIGINAL"])
@pytest.mark.parametrize("length", TABLES)
def test_original_is_the_sequential_loop(text: str, length: int) -> None:
    found = jf.Strategy.parse(text, num_blocks=8, num_tokens=length)
    assert all(solver.partition == jf.Sequential() for solver in found.solvers)
    assert len(found.solvers) == 8
    assert str(found) == "Original"


@pytest.mark.parametrize("text", ["Jacobi-30", "jacobi-30", "JACOBI-30"])
def test_case_does_not_matter(text: str) -> None:
    found = jf.Strategy.parse(text, num_blocks=8, num_tokens=1024)
    assert found == jf.Strategy.uniform(jf.Solver(stopping=jf.MaxSweeps(30)), 8)
    assert str(found) == "Jacobi-30"


def test_the_tolerance_of_a_text() -> None:
    for text in ("original", "jacobi", "gs-jacobi:3", "window:3"):
        found = jf.Strategy.parse(text, num_blocks=2, num_tokens=16, tolerance=1e-5)
        assert {solver.stopping for solver in found.solvers} == {jf.Tolerance(1e-5)}
        with pytest.raises(ValueError, match="-1"):
            jf.Strategy.parse(text, num_blocks=2, num_tokens=16, tolerance=-1)
    for text in ("jacobi-3", "gs-jacobi:3-2", "[1-3-2-1]"):
        found = jf.Strategy.parse(text, num_blocks=2, num_tokens=16, tolerance=1e-5)
        assert all(solver.stopping.atol is None for solver in found.solvers)


T, L = 24, 6  # of the flow in the tests below
to_default = jf.Tolerance(DEFAULT)
sweep_counts = st.integers(1, 40) | st.integers(1, 10**9 - 1)
segment_counts = st.integers(1, T)
stacked = st.builds(gs_jacobi, segment_counts, sweep_counts)


@st.composite
def with_notation(draw: st.DrawFn) -> tuple[jf.Solver, ...]:
    """Solvers of every form that has a notation."""
    form = draw(st.sampled_from(["stack", "shared", "all alike"]))
    if form == "all alike":
        alike = st.one_of(
            st.builds(lambda j: jf.Solver(stopping=jf.MaxSweeps(j)), sweep_counts),
            st.just(jf.Solver(jf.Sequential(), stopping=to_default)),
            st.just(jf.Solver(jf.Whole(), stopping=to_default)),
            st.builds(lambda count: jf.Solver(jf.Segments(count), stopping=to_default), segment_counts),
            st.builds(lambda size: jf.Solver(jf.Window(size), stopping=to_default), st.integers(1, 10**6)),
            stacked,
        )
        return (draw(alike),) * L
    solver, other = draw(stacked), jf.Solver(stopping=jf.MaxSweeps(draw(sweep_counts)))
    stack = draw(st.sets(st.integers(0, L - 1)))
    pick = (lambda: draw(stacked)) if form == "stack" else lambda: solver
    return tuple(pick() if block in stack else other for block in range(L))


@given(with_notation())
@many
def test_a_strategy_that_has_a_notation_prints_it(solvers: tuple[jf.Solver, ...]) -> None:
    """Whatever the guesses: those are the report's, or the latent without one."""
    strategy = jf.Strategy(solvers)
    text = str(strategy)
    assert "\n" not in text
    assert "Solver" not in text
    assert jf.Strategy.parse(text, num_blocks=L, num_tokens=T) == strategy
    report = make_report(num_tokens=T, igm=IGM_6)
    guessed = jf.Strategy(tuple(replace(s, guess=report.guess(block)) for block, s in enumerate(solvers)))
    assert str(guessed) == text
    assert jf.Strategy.parse(text, report) == guessed
    assert resolve(text, L, T, None) == strategy


def test_all_blocks_stacked() -> None:
    """Else is for no block then."""
    strategy = jf.Strategy(tuple(gs_jacobi(count, sweeps) for count, sweeps in ((8, 3), (8, 4), (5, 3))))
    assert str(strategy).startswith("[0/1/2-8/8/5-3/4/3-")
    for text in ("[0/1/2-8/8/5-3/4/3-1]", "[0/1/2-8/8/5-3/4/3-77]", "[2/0/1-5/8/8-3/3/4-9]", str(strategy)):
        assert jf.Strategy.parse(text, num_blocks=3, num_tokens=16) == strategy
    assert jf.Strategy.parse("[0/1/2-8-3-5]", num_blocks=3, num_tokens=16) == jf.Strategy.uniform(gs_jacobi(8, 3), 3)


def test_numbers_are_shared_where_they_can_be() -> None:
    for text in ("[0/2-8-3-5]", "[0/2-8-3/4-5]", "[0/2-8/7-3-5]", "[0/2-8/7-3/4-5]", "[1-16-1-1]", "[2-1-9-5]"):
        assert str(jf.Strategy.parse(text, num_blocks=3, num_tokens=16)) == text
    assert str(jf.Strategy.parse("[2/0-8/8-3/4-5]", num_blocks=3, num_tokens=16)) == "[0/2-8-4/3-5]"
    assert str(jf.Strategy.parse("gs-jacobi:8-3", num_blocks=2, num_tokens=16)).startswith("[0/1-8-3-")


@dataclass(frozen=True)
class Halves:
    """A partition of a reader's own."""

    def stop(self, front: int, num_tokens: int) -> int:
        return num_tokens // 2 if front < num_tokens // 2 else num_tokens

    def check(self, num_tokens: int) -> None:
        pass


@dataclass(frozen=True)
class Damped:
    """A correction of a reader's own."""

    def __call__(self, old: Tensor, new: Tensor, front: int) -> Tensor:
        return (old + new) / 2


AFFINE_GUESS = jf.MeanAffine(torch.zeros(16, 3), torch.zeros(16, 3))
NO_NOTATION: dict[str, tuple[jf.Solver, ...]] = {
    "counts per segment": (jf.Solver(jf.Segments(3), stopping=jf.MaxSweeps((5, 3, 2))),) * 3,
    "one block with counts per segment": (
        jf.Solver(stopping=jf.MaxSweeps(3)),
        jf.Solver(jf.Segments(2), stopping=jf.MaxSweeps((5, 3))),
    ),
    "equal counts per segment": (jf.Solver(jf.Segments(2), stopping=jf.MaxSweeps((3, 3))),) * 2,
    "a count per segment and a tolerance": (jf.Solver(jf.Segments(2), stopping=Stopping(DEFAULT, (3, 3))),) * 2,
    "other tolerance": (jf.Solver(stopping=jf.Tolerance(1e-4)),) * 2,
    "other tolerance, sequential": (jf.Solver(jf.Sequential(), stopping=jf.Tolerance(0)),) * 2,
    "both ends": (jf.Solver(stopping=Stopping(DEFAULT, 4)),) * 2,
    "both ends, segments": (jf.Solver(jf.Segments(2), stopping=Stopping(DEFAULT, 4)),) * 2,
    "two numbers of plain sweeps": (
        jf.Solver(stopping=jf.MaxSweeps(3)), jf.Solver(stopping=jf.MaxSweeps(4)), gs_jacobi(2, 3)
    ),
    "windows of few sweeps": (jf.Solver(jf.Window(3), stopping=jf.MaxSweeps(4)),) * 2,
    "sequential after sweeps": (jf.Solver(jf.Sequential(), stopping=jf.MaxSweeps(4)),) * 2,
    "two windows": (jf.Solver(jf.Window(3)), jf.Solver(jf.Window(4))),
    "a window and a stack": (jf.Solver(jf.Window(3)), gs_jacobi(2, 3), jf.Solver(stopping=jf.MaxSweeps(3))),
    "a tolerance and a stack": (jf.Solver(), gs_jacobi(2, 3)),
    "a calibrated guess": (jf.Solver(jf.Window(3), AFFINE_GUESS), jf.Solver(jf.Window(4), AFFINE_GUESS)),
    "a partition of a reader's own": (jf.Solver(Halves(), stopping=jf.MaxSweeps(4)),) * 2,
    "a reader's own partition beside a stack": (jf.Solver(Halves(), stopping=jf.MaxSweeps(4)), gs_jacobi(2, 3)),
    "a correction of a reader's own": (jf.Solver(correction=Damped()),) * 2,
    "a reader's own correction in a stack": (
        replace(gs_jacobi(2, 3), correction=Damped()), jf.Solver(stopping=jf.MaxSweeps(4))
    ),
    "more sweeps than a stack's notation takes": (gs_jacobi(2, 10**9), jf.Solver(stopping=jf.MaxSweeps(4))),
}  # fmt: skip


@pytest.mark.parametrize("solvers", NO_NOTATION.values(), ids=NO_NOTATION)
def test_a_strategy_without_a_notation_lists_its_blocks(solvers: tuple[jf.Solver, ...]) -> None:
    """A line for each block, with its solver; which is no notation, and is not taken for one."""
    text = str(jf.Strategy(solvers))
    lines = text.splitlines()
    assert len(lines) == len(solvers)
    for block, (line, solver) in enumerate(zip(lines, solvers, strict=True)):
        assert f"block {block}" in line
        assert len(line) < 250
        assert type(solver.partition).__name__ in line
        for number in np.atleast_1d(np.array(solver.stopping.max_sweeps or [], int)).tolist():
            assert str(number) in line
    with pytest.raises(ValueError, match="strategy"):
        jf.Strategy.parse(text, num_blocks=len(solvers), num_tokens=16)


@given(strategies)
@many
def test_what_any_strategy_prints_is_parsed_to_it_or_refused(strategy: jf.Strategy) -> None:
    """But for its guesses."""
    text = str(strategy)
    try:
        found = jf.Strategy.parse(text, num_blocks=len(strategy.solvers), num_tokens=10**6)
    except ValueError:
        assert text.startswith("block 0: ")
        return
    assert found == jf.Strategy(tuple(replace(solver, guess=jf.Latent()) for solver in strategy.solvers))


NINES = "9" * 5000  # more digits than Python turns into a number
MALFORMED: dict[str, tuple[str, str]] = {
    name: (text, at)
    for name, text, at in [
        ("empty", "", "''"),
        ("blank", "  \t", "strategy"),
        ("empty brackets", "[]", "[]"),
        ("one bracket", "[", "["),
        ("the other bracket", "]", "]"),
        ("empty fields", "[---]", "Stack ''"),
        ("no Else", "[7-8-32]", "[7-8-32]"),
        ("one field", "[7]", "[7]"),
        ("five fields", "[7-8-32-10-1]", "[7-8-32-10-1]"),
        ("empty Stack", "[-8-32-10]", "Stack ''"),
        ("empty GS", "[7--32-10]", "GS ''"),
        ("empty J", "[7-8--10]", "J ''"),
        ("empty Else", "[7-8-32-]", "Else ''"),
        ("block 8 of 8", "[8-8-32-10]", "block 8"),
        ("block 8 of 8 beside another", "[7/8-8-32-10]", "block 8"),
        ("block far out", "[999999999-8-32-10]", "block 999999999"),
        ("block twice", "[7/7-8-32-10]", "7/7"),
        ("block twice, not side by side", "[0/7/0-8-32-10]", "0/7/0"),
        ("block twice, with a zero before", "[7/07-8-32-10]", "7/07"),
        ("GS of 0", "[7-0-32-10]", "GS 0"),
        ("one GS of 0", "[0/7-8/0-32-10]", "GS 0"),
        ("GS above T", "[7-17-1-10]", "GS 17"),
        ("one GS above T", "[0/7-16/17-1-10]", "GS 17"),
        ("J of 0", "[7-8-0-10]", "J 0"),
        ("one J of 0", "[0/7-8-3/0-10]", "J 0"),
        ("Else of 0", "[7-8-32-0]", "Else 0"),
        ("Else of 0, all stacked", "[0/1/2/3/4/5/6/7-8-32-0]", "Else 0"),
        ("two Else", "[0/7-8-32-10/20]", "10/20"),
        ("three GS for two", "[0/7-1/2/3-32-10]", "GS '1/2/3'"),
        ("two GS for one", "[7-1/2-32-10]", "GS '1/2'"),
        ("two GS for three", "[0/1/2-1/2-32-10]", "GS '1/2'"),
        ("three J for two", "[0/7-8-1/2/3-10]", "J '1/2/3'"),
        ("two J for one", "[7-8-1/2-10]", "J '1/2'"),
        ("letter in Stack", "[a-8-32-10]", "Stack 'a'"),
        ("letter in GS", "[7-8x-32-10]", "GS '8x'"),
        ("letter in J", "[7-8-0x20-10]", "J '0x20'"),
        ("exponent in Else", "[7-8-32-1e1]", "Else '1e1'"),
        ("plus", "[7-+8-32-10]", "GS '+8'"),
        ("minus", "[7-8-32--10]", "[7-8-32--10]"),
        ("minus at first", "[-7-8-32-10]", "[-7-8-32-10]"),
        ("space in Stack", "[ 7-8-32-10]", "Stack ' 7'"),
        ("space in Else", "[7-8-32-10 ]", "Else '10 '"),
        ("space in a list", "[0/ 7-8-32-10]", "Stack '0/ 7'"),
        ("newline", "[7-8\n-32-10]", "GS '8\\n'"),
        ("newline at the end of Else", "[7-8-32-10\n]", "Else '10\\n'"),
        ("decimal", "[7-8-32.0-10]", "J '32.0'"),
        ("decimal comma", "[7-8-32,5-10]", "J '32,5'"),
        ("underscore", "[7-8-3_2-10]", "J '3_2'"),
        ("slash at the end", "[7/-8-32-10]", "Stack '7/'"),
        ("slash at first", "[7-/8-32-10]", "GS '/8'"),
        ("two slashes", "[0//7-8-32-10]", "Stack '0//7'"),
        ("only a slash", "[7-8-/-10]", "J '/'"),
        ("backslash", "[0\\7-8-32-10]", "Stack"),
        ("Arabic-Indic digit", "[7-٨-32-10]", "GS '٨'"),
        ("fullwidth digit", "[７-8-32-10]", "Stack '７'"),
        ("superscript", "[7-8-3²-10]", "J '3²'"),
        ("Roman numeral", "[7-8-32-Ⅹ]", "Else 'Ⅹ'"),
        ("long dashes", "[7–8–32–10]", "[7–8–32–10]"),
        ("minus signs", "[7−8−32−10]", "[7−8−32−10]"),
        ("long Stack", f"[{NINES}-8-32-10]", f"Stack '{NINES}'"),
        ("long GS", f"[7-{NINES}-32-10]", f"GS '{NINES}'"),
        ("long J", f"[7-8-{NINES}-10]", f"J '{NINES}'"),
        ("long Else", f"[7-8-32-{NINES}]", f"Else '{NINES}'"),
        ("no end", "[7-8-32-10", "[7-8-32-10"),
        ("no beginning", "7-8-32-10]", "7-8-32-10]"),
        ("no brackets", "7-8-32-10", "7-8-32-10"),
        ("round brackets", "(7-8-32-10)", "(7-8-32-10)"),
        ("double brackets", "[[7-8-32-10]]", "[7"),
        ("two of them", "[7-8-32-10][7-8-32-10]", "[7-8-32-10]"),
        ("text after it", "[7-8-32-10] x", "[7-8-32-10] x"),
        ("text before it", "x [7-8-32-10]", "x [7-8-32-10]"),
        ("Jacobi of 0", "Jacobi-0", "J 0"),
        ("Jacobi of nothing", "Jacobi-", "Jacobi-"),
        ("Jacobi with a sign", "Jacobi--3", "Jacobi--3"),
        ("Jacobi with a plus", "Jacobi-+3", "Jacobi-+3"),
        ("Jacobi with a space", "Jacobi- 3", "Jacobi- 3"),
        ("Jacobi of a fraction", "Jacobi-1.5", "Jacobi-1.5"),
        ("Jacobi with two numbers", "Jacobi-3-4", "Jacobi-3-4"),
        ("Jacobi without a dash", "Jacobi30", "Jacobi30"),
        ("Jacobi in Arabic-Indic", "Jacobi-٣", "Jacobi-٣"),
        ("Jacobi superscript", "Jacobi-³", "Jacobi-³"),
        ("Jacobi, long", f"Jacobi-{NINES}", f"{NINES}"),
        ("GS-Jacobi of 0", "gs-jacobi:0", "G 0"),
        ("GS-Jacobi above T", "gs-jacobi:17", "G 17"),
        ("GS-Jacobi of J 0", "gs-jacobi:8-0", "J 0"),
        ("GS-Jacobi of nothing", "gs-jacobi:", "gs-jacobi:"),
        ("GS-Jacobi without J", "gs-jacobi:8-", "gs-jacobi:8-"),
        ("GS-Jacobi with slashes", "gs-jacobi:8/4", "gs-jacobi:8/4"),
        ("GS-Jacobi in Arabic-Indic", "gs-jacobi:٣", "gs-jacobi:٣"),
        ("GS-Jacobi, J in Arabic-Indic", "gs-jacobi:3-٣", "gs-jacobi:3-٣"),
        ("GS-Jacobi, long", f"gs-jacobi:{NINES}", f"{NINES}"),
        ("GS-Jacobi, long J", f"gs-jacobi:8-{NINES}", f"{NINES}"),
        ("window of 0", "window:0", "N 0"),
        ("window of less", "window:-1", "window:-1"),
        ("window in Arabic-Indic", "window:٣", "window:٣"),
        ("window, long", f"window:{NINES}", f"{NINES}"),
        ("another word", "newton", "newton"),
        ("a word and more", "original-3", "original-3"),
    ]
}  # fmt: skip


@pytest.mark.parametrize(("text", "at"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_text_is_refused_with_the_part_at_fault(text: str, at: str) -> None:
    with pytest.raises(ValueError, match="strategy") as caught:
        jf.Strategy.parse(text, num_blocks=8, num_tokens=16)
    assert at in str(caught.value)


pieces = st.sampled_from(
    ["[", "]", "-", "/", "7", "0", "12", "jacobi", "gs-jacobi", "window", ":", "auto", "original", ".json", " ", "x",
     "²", "٣", "\n", "[7-8-32-10]", "+", ".", "_", "９" * 20, "9" * 20, "\0", "ſ", "K"]
)  # fmt: skip
any_text = st.one_of(
    st.text(),
    st.lists(pieces, max_size=9).map("".join),
    st.from_regex(r"\[\d(/\d)?(-\d+(/\d+)?){2}-\d+\]", fullmatch=True),
    st.from_regex(r"\[[0-9](/[0-9]){0,2}-[0-9]{1,2}(/[0-9]{1,2}){0,2}-[0-9]{1,2}-[0-9]{1,2}\]", fullmatch=True),
    st.from_regex(r"(jacobi-|gs-jacobi:|window:)\d{1,3}(-\d{1,3})?", fullmatch=True),
)


@given(text=any_text)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_text_is_a_strategy_or_a_value_error(text: str) -> None:
    try:
        found = resolve(text, 8, 16, None)
    except ValueError:
        return
    assert len(found.solvers) == 8
    assert jf.Strategy.from_json(found.to_json()) == found
    for solver in found.solvers:
        stops = [solver.partition.stop(front, 16) for front in range(16)]
        assert all(front < stop <= 16 for front, stop in enumerate(stops))


@given(text=any_text)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Numbers are those of ASCII; and what was parsed prints a text that says the same."""
    report = make_report(num_tokens=16, igm=IGM_6)
    try:
        found = jf.Strategy.parse(text, num_blocks=6, num_tokens=16)
    except ValueError:
        with pytest.raises(ValueError, match="strategy"):
            jf.Strategy.parse(text, report)
        return
    assert len(found.solvers) == 6
    assert not any(char.isdigit() and not char.isascii() for char in text)
    assert jf.Strategy.parse(str(found), num_blocks=6, num_tokens=16) == found
    guessed = jf.Strategy.parse(text, report)
    for block, (with_report, without) in enumerate(zip(guessed.solvers, found.solvers, strict=True)):
        assert replace(without, guess=report.guess(block)) == with_report


# ------------------------------------------------------------------------------------------------------- with a report

Counts = Sequence[int | None]


def trace(counts: Mapping[float, Counts]) -> Trace:
    """A trace that reaches the tolerances after these numbers of sweeps, one for each sample."""
    return Trace((1.0, 0.0), (1.0, 0.0), {tolerance: tuple(each) for tolerance, each in counts.items()})


def same(counts: Counts) -> Trace:
    return trace(dict.fromkeys(TOLERANCES, counts))


def igm_row(latent: float, zeros: float, affine: float) -> dict[str, float]:
    return dict(zip(GUESS_NAMES, (latent, zeros, affine), strict=True))


IGM_6 = [
    igm_row(5.4e5, 9.9, 12), igm_row(7.2, 6.9, 0.1), igm_row(3, 5, 4), igm_row(math.inf, math.inf, 8),
    igm_row(1, 1, 1), igm_row(2, 1, 1),
]  # fmt: skip
BEST_6 = ["zeros", "mean_affine", "latent", "mean_affine", "latent", "zeros"]  # of equals, the first


def make_report(
    num_tokens: int = 16, igm: Sequence[Mapping[str, float]] | None = None, crm: Sequence[float] | None = None,
    noise: Sequence[Mapping[str, Trace]] | None = None,
    segments: Mapping[int, Mapping[int, Sequence[Trace]]] | None = None, norm: Any = 2,
) -> jf.Report:  # fmt: skip
    """A report with what a strategy needs of one, and other numbers in the norms that its settings do not name."""
    length = len(igm or crm or noise or ())
    igm = igm or [igm_row(1, 2, 3)] * length
    crm = crm or [1.0] * length
    noise = noise or [dict.fromkeys(GUESS_NAMES, same((min(4, num_tokens), min(6, num_tokens))))] * length
    metrics = Metrics(tuple(igm), tuple(Components(value, 1.0, 0.0) for value in crm))
    others = Metrics(tuple(igm_row(3, 2, 1) for _ in igm), None)
    return jf.Report(
        fingerprint="0" * 64,
        num_tokens=num_tokens,
        token_channels=3,
        settings=Settings(8, False, norm, None, 8, 2, 0),
        metrics={name: metrics if name == norm else others for name in NORMS},
        segment_metrics=(metrics,) * length,
        class_metrics={},
        mean_affine=tuple(
            jf.MeanAffine(torch.full((num_tokens, 3), 0.1 * i), torch.ones(num_tokens, 3)) for i in range(length)
        ),
        traces={"noise": tuple(noise)},
        segment_traces={block: {g: tuple(row) for g, row in rows.items()} for block, rows in (segments or {}).items()},
        gamma=((1.0,),) * length,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("text", ["[0/5-4-3-2]", "jacobi", "Original", "Jacobi-3", "window:4", "gs-jacobi:4"])
def test_a_report_gives_each_block_the_guess_of_the_smallest_igm(text: str, norm: Any) -> None:
    report = make_report(igm=IGM_6, norm=norm)
    found = jf.Strategy.parse(text, report)
    guesses = [{"latent": jf.Latent(), "zeros": jf.Zeros()}.get(name) for name in BEST_6]
    want = [guess or report.mean_affine[block] for block, guess in enumerate(guesses)]
    assert [solver.guess for solver in found.solvers] == want
    plain = jf.Strategy.parse(text, num_blocks=6, num_tokens=16)
    assert [replace(solver, guess=jf.Latent()) for solver in found.solvers] == list(plain.solvers)
    assert {solver.guess for solver in plain.solvers} == {jf.Latent()}
    assert jf.Strategy.parse(text, report, num_blocks=6, num_tokens=16) == found
    assert jf.Strategy.from_json(found.to_json()) == found


@pytest.mark.parametrize("sizes", [{"num_blocks": 5}, {"num_tokens": 8}, {"num_blocks": 6, "num_tokens": 17},
                                   {"num_blocks": 0}, {"num_tokens": 0}], ids=str)  # fmt: skip
def test_sizes_that_contradict_the_report_are_refused(sizes: dict[str, int]) -> None:
    wrong = next(name for name, size in sizes.items() if size != {"num_blocks": 6, "num_tokens": 16}[name])
    with pytest.raises(ValueError, match=f"{wrong}={sizes[wrong]}"):
        jf.Strategy.parse("jacobi", make_report(igm=IGM_6), **sizes)


@pytest.mark.parametrize(("sizes", "missing"), [({}, "num_blocks"), ({"num_blocks": 8}, "num_tokens"),
                                                ({"num_tokens": 16}, "num_blocks")])  # fmt: skip
@pytest.mark.parametrize("text", ["jacobi", "[7-8-3-1]"])
def test_sizes_are_needed_without_a_report(text: str, sizes: dict[str, int], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        jf.Strategy.parse(text, **sizes)


def test_sizes_of_the_report_bound_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"17.*16"):
        jf.Strategy.parse("[5-17-1-1]", make_report(igm=IGM_6))
    with pytest.raises(ValueError, match="block 6"):
        jf.Strategy.parse("[6-16-1-1]", make_report(igm=IGM_6))


# ---------------------------------------------------------------------------------------- Algorithm 1, invented numbers

IMG64COND = (141.22, 9.25, 1.36, 1.82, 7.68, 5.08, 3.08, 19.81)  # CRM, Table 2 of the paper
IMG64UNCOND = (22.29, 1.06, 1.01, 1.48, 0.77, 0.58, 14.78, 1.95)


def paper_like(tough: Mapping[int, Mapping[int, Sequence[Trace]]], crm: Sequence[float] = IMG64COND) -> jf.Report:
    noise = [dict.fromkeys(GUESS_NAMES, same((3, 200))) for _ in crm]
    for block in range(8):
        if block not in tough:
            noise[block] = {"latent": same((2, 1 + block % 6)), "zeros": same((50, 60)), "mean_affine": same((None, 1))}
    return make_report(256, [igm_row(1, 2, 3)] * 8, crm, noise, tough)


def test_the_strategy_that_a_report_proposes() -> None:
    """Block 7: G = 8 is the cheapest. Block 0: what is within T // G costs more than the loop. Else: block 5's 6."""
    block_0 = {1: [same((200, 9))], 8: [same((33, 2)), *[same((1, 1))] * 7], 16: [same((3, 15))] * 16}
    block_7 = {1: [same((64, 1))], 8: [same((4, 13)), *[same((12, 3))] * 7], 16: [same((12, 12))] * 16}
    report = paper_like({0: block_0, 7: block_7})
    found = jf.Strategy.from_report(report)
    assert str(found) == "[0/7-256/8-1/13-6]"
    assert found == jf.Strategy.parse("[0/7-256/8-1/13-6]", report)
    assert found.solvers == jf.Strategy.parse("[0/7-256/8-1/13-6]", num_blocks=8, num_tokens=256).solvers
    each = jf.Strategy.from_report(report, per_segment=True)
    assert each.solvers[7] == jf.Solver(jf.Segments(8), stopping=jf.MaxSweeps((13, *[12] * 7)))
    assert [s for i, s in enumerate(each.solvers) if i != 7] == [s for i, s in enumerate(found.solvers) if i != 7]


@pytest.mark.parametrize(("crm", "tough"), [(IMG64COND, {0, 7}), (IMG64UNCOND, {0, 6}), ((1.0,) * 8, set())])
def test_the_tough_blocks_are_stacked(crm: Sequence[float], tough: set[int]) -> None:
    """As the paper stacks them, or none."""
    report = paper_like({block: {8: [same((3, 4))] * 8} for block in tough}, crm)
    found = jf.Strategy.from_report(report)
    for block, solver in enumerate(found.solvers):
        assert solver.partition == (jf.Segments(8) if block in tough else jf.Whole())
        assert solver.stopping == jf.MaxSweeps(4 if block in tough else 6)
        assert solver.guess == report.guess(block)


def test_else_is_what_the_slowest_easy_block_needed_from_its_own_guess() -> None:
    """Of its best guess alone, and at least a sweep; T sweeps where a sample never got there."""
    easy = {"latent": same((9, 9)), "zeros": same((3, 7)), "mean_affine": same((8, 8))}
    tough = dict.fromkeys(GUESS_NAMES, same((16, 16)))
    igm = [igm_row(1, 2, 3), igm_row(2, 1, 3), igm_row(2, 1, 3)]
    loop = {0: {1: [same((16, 16))]}}

    def other(noise: list[Mapping[str, Trace]]) -> set[jf.Stopping]:
        found = jf.Strategy.from_report(make_report(16, igm, [90, 1, 1], noise, loop))
        assert found.solvers[0].partition == jf.Segments(16)
        assert {solver.partition for solver in found.solvers[1:]} == {jf.Whole()}
        return {solver.stopping for solver in found.solvers[1:]}

    assert other([tough, easy, {**easy, "zeros": same((2, 5))}]) == {jf.MaxSweeps(7)}
    assert other([tough, {**easy, "zeros": same((0, 0))}, {**easy, "zeros": same((0, 0))}]) == {jf.MaxSweeps(1)}
    assert other([tough, {**easy, "zeros": same((1, None))}, easy]) == {jf.MaxSweeps(16)}


def test_each_tolerance_has_its_own_counts() -> None:
    slow = trace({1e-1: (2, 1), 1e-2: (3, 4), 1e-3: (5, 5), 1e-4: (None, 2)})
    noise = [dict.fromkeys(GUESS_NAMES, slow)] * 3
    segments = {0: {2: [slow, slow]}}
    report = make_report(16, crm=[90, 1, 1], noise=noise, segments=segments)
    for tolerance, want in ((1e-1, "[0-2-2-2]"), (1e-2, "[0-2-4-4]"), (1e-3, "[0-2-5-5]"), (1e-4, "[0-16-1-16]")):
        assert str(jf.Strategy.from_report(report, tolerance)) == want
    assert jf.Strategy.from_report(report) == jf.Strategy.from_report(report, 1e-2)


@pytest.mark.parametrize("tolerance", [0.05, 0, 1, 1e-5, -1e-2, math.nan, math.inf])
@pytest.mark.parametrize("crm", [(90.0, 1.0, 1.0), (1.0, 1.0, 1.0)], ids=["a tough block", "none"])
def test_a_tolerance_that_was_not_measured_is_refused(tolerance: float, crm: Sequence[float]) -> None:
    report = make_report(crm=crm, segments={0: {1: [same((3, 4))]}})
    with pytest.raises(ValueError, match=rf"tolerance {tolerance}.*0\.01"):
        jf.Strategy.from_report(report, tolerance)


def test_a_flow_without_crm_is_refused() -> None:
    report = make_report(crm=(9.0, 1.0, 1.0))
    undefined = replace(report, metrics={norm: Metrics(m.igm, None) for norm, m in report.metrics.items()})
    with pytest.raises(ValueError, match="CRM"):
        jf.Strategy.from_report(undefined)
    assert jf.Strategy.parse("jacobi", undefined).solvers[0].guess == jf.Latent()  # IGM alone is enough for a text


@dataclass(frozen=True)
class Plan:
    """One way to solve a tough block, and what it costs in tokens."""

    cost: float
    count: int
    sweeps: int | tuple[int, ...]


def affordable(
    length: int, call_cost: float, measured: Mapping[int, Sequence[Counts]], per_segment: bool
) -> list[Plan]:
    """Every plan that the measurements allow: those of at most T // G sweeps that all samples need, and the loop."""
    plans = [Plan(length * (1 + call_cost), length, 1)]
    for count, rows in measured.items():
        if any(sweeps is None for row in rows for sweeps in row):
            continue
        each = [max(1, *(sweeps for sweeps in row if sweeps is not None)) for row in rows]
        if max(each) > length // count:
            continue
        sweeps = each if per_segment else [max(each)] * count
        cost = sum(j * length / count + j * call_cost for j in sweeps)
        plans.append(Plan(cost, count, tuple(each) if per_segment else max(each)))
    return plans


@given(
    power=st.integers(0, 8), call_cost=st.sampled_from([0.0, 1.0, 4.0, 32.0, 1000.0]), per_segment=st.booleans(),
    hard=st.floats(0, 1.3), data=st.data(),
)  # fmt: skip
@many
def test_the_plan_of_a_tough_block_is_the_cheapest_of_those_measured(
    power: int, call_cost: float, per_segment: bool, hard: float, data: st.DataObject
) -> None:
    length = 2**power
    measured = {}
    for count in sorted(data.draw(st.sets(st.sampled_from([2**k for k in range(power + 1)])))):
        most = max(1, math.ceil(hard * length / count))
        one = st.integers(0, most) | (st.none() if data.draw(st.integers(0, 5)) == 0 else st.nothing())
        measured[count] = data.draw(st.lists(st.tuples(one, one), min_size=count, max_size=count)) if count <= 16 else [
            data.draw(st.tuples(one, one))
        ] * count  # fmt: skip
    segments = {1: {count: [same(row) for row in rows] for count, rows in measured.items()}}
    report = make_report(length, crm=(1.0, 90.0, 1.0), segments=segments)
    found = jf.Strategy.from_report(report, per_segment=per_segment, call_cost=call_cost)
    plans = affordable(length, call_cost, measured, per_segment)
    best = min(plan.cost for plan in plans)
    chosen = found.solvers[1]
    assert isinstance(chosen.partition, jf.Segments)
    assert any(
        math.isclose(plan.cost, best, rel_tol=1e-9, abs_tol=1e-9)
        and (plan.count, plan.sweeps) == (chosen.partition.count, chosen.stopping.max_sweeps)
        for plan in plans
    ), (chosen, plans)
    assert chosen.stopping.atol is None
    assert np.max(chosen.stopping.max_sweeps) <= max(1, length // chosen.partition.count)
    assert found.solvers[0] == found.solvers[2] == jf.Solver(stopping=jf.MaxSweeps(min(6, length)))
    if not per_segment:
        assert jf.Strategy.parse(str(found), report) == found
    assert jf.Strategy.from_json(found.to_json()) == found


# -------------------------------------------------------------------------------------- Algorithm 1, a real calibration


@dataclass(frozen=True)
class Calibrated:
    """A tiny float64 flow with a tough block, its report, and the latents that its sweeps were traced from."""

    flow: jf.TarFlow
    report: jf.Report
    latents: Tensor


@cache
def calibrated(image_size: int, easier: float) -> Calibrated:
    flow = copy.deepcopy(make_flow(image_size=image_size, patch_size=2, num_blocks=3))
    with torch.no_grad():
        for block, factor in zip(flow.blocks, (easier, 0.7, easier), strict=True):
            block.proj_out.weight.mul_(factor)
    images = jf.decode(flow, latents(flow, 8), strategy="sequential").images
    report = jf.calibrate(flow, images, traced=8, segments=3, progress=False)
    config = flow.config
    return Calibrated(flow, report, draw_latents(8, config.num_tokens, config.token_channels, 0, 2**40).double())


@dataclass(frozen=True)
class Step:
    """A block on the sequential way from latents to images: its input, its answer, and matrices of its map there.

    `gamma` is the Jacobian of g in x, `gain` that in z, of each sample, over tokens and channels in causal order.
    """

    z: Tensor
    answer: Tensor
    gamma: Tensor
    gain: Tensor


@cache
def steps(image_size: int, easier: float) -> tuple[Step, ...]:
    found = calibrated(image_size, easier)
    reference = Oracle(found.flow)
    x, taken = found.latents * reference.var.sqrt(), []
    for i in (2, 1, 0):
        z = reference.flip(i, x)
        answer = sequential(lambda x, i=i, z=z: reference.g(i, x, z), z)  # type: ignore[misc]

        def flat(x: Tensor, z: Tensor, i: int = i, shape: torch.Size = z.shape) -> Tensor:
            return reference.g(i, x.view(shape), z.view(shape)).flatten(1).sum(dim=0)

        jacobians = torch.autograd.functional.jacobian(flat, (answer.flatten(1), z.flatten(1)), vectorize=True)
        gamma, gain = (matrix.transpose(0, 1) for matrix in jacobians)
        taken.append(Step(z, answer, gamma, gain))
        x = reference.flip(i, answer)
    return tuple(taken[::-1])


def amplified(step: Step, partition: Any) -> Tensor:
    """Per sample, how far off a block is per unit of distance of each segment from its solution given those before it.

    To first order, with Gamma the Jacobian of g and D that of the segments on their own: the largest row sum of
    |(I - Gamma)^-1 (I - D)|, which is 1 for a single segment.
    """
    length, channels = step.z.shape[1:]
    segment = torch.tensor([partition.stop(t, length) for t in range(length)]).repeat_interleave(channels)
    eye = torch.eye(length * channels, dtype=torch.float64)
    own = step.gamma * (segment[:, None] == segment)
    return (torch.linalg.inv(eye - step.gamma) @ (eye - own)).abs().sum(dim=2).amax(dim=1)


FLOWS = [(8, 0.5), (10, 0.25)]


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize(
    ("tolerance", "call_cost"), [(1e-1, 4.0), (1e-1, 5.0), (1e-2, 0.0), (1e-2, 32.0), (1e-3, 32.0)]
)
@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_the_error_of_a_proposed_strategy_is_what_its_tolerance_explains(
    flow: tuple[int, float], tolerance: float, call_cost: float, per_segment: bool
) -> None:
    """At the latents that it was measured on, against the oracle's sequential answer, block by block and in the end.

    A block swept whole is within the tolerance. In a segmented one, the distance of each segment adds up; and in the
    end that of all blocks. What each contributes is known to first order; 2 is for the rest of one block, and in the
    end no more than the bounds of all blocks is needed: they do not all err the same way.
    """
    found, path = calibrated(*flow), steps(*flow)
    strategy = jf.Strategy.from_report(found.report, tolerance, per_segment=per_segment, call_cost=call_cost)
    assert [i for i, s in enumerate(strategy.solvers) if isinstance(s.partition, jf.Segments)] == list(
        found.report.tough_blocks
    )
    allowed = torch.zeros(8, dtype=torch.float64)
    onward = torch.eye(path[0].gamma.shape[1], dtype=torch.float64).expand_as(path[0].gamma)
    for step, block, solver in zip(path, found.flow.blocks, strategy.solvers, strict=True):
        x = jf.solve(block, step.z, solver).x
        factor = amplified(step, solver.partition)
        if solver.partition == jf.Segments(found.report.num_tokens):
            factor = factor * 0  # the sequential loop
        off = (x - step.answer).abs().amax(dim=(1, 2))
        if isinstance(solver.partition, jf.Whole):
            assert torch.allclose(factor, torch.ones_like(factor))
            assert (off <= tolerance + 1e-9).all()
        assert (off <= 2 * factor * tolerance + 1e-9).all()
        allowed += onward.abs().sum(dim=2).amax(dim=1) * factor * tolerance
        # From the answer of the block decoded before this one to that of this one, and on to the images; tokens flip.
        solved = torch.linalg.inv(torch.eye(step.gamma.shape[1], dtype=torch.float64) - step.gamma)
        channels = step.z.shape[2]
        flip = torch.eye(step.gamma.shape[1], dtype=torch.float64).unflatten(0, (-1, channels)).flip(0).flatten(0, 1)
        onward = onward @ solved @ step.gain @ flip

    out = jf.decode(found.flow, found.latents, strategy=strategy)
    reference = Oracle(found.flow)
    off = (out.images - reference.decode(found.latents)).abs().amax(dim=(1, 2, 3))
    assert (off <= allowed + 1e-9).all()
    assert off.max() > 1e-9  # it does stop early
    assert out.resolved_sequentially == 0


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_a_sweep_less_than_proposed_is_too_few(flow: tuple[int, float], tolerance: float) -> None:
    """Else, and the J of a tough block in one piece, are the fewest that bring all samples within the tolerance."""
    found, path = calibrated(*flow), steps(*flow)
    strategy = jf.Strategy.from_report(found.report, tolerance, call_cost=1e4)
    (tough,) = found.report.tough_blocks
    assert strategy.solvers[tough].partition == jf.Segments(1)

    def off(block: int, less: int) -> float:
        solver = strategy.solvers[block]
        assert isinstance(solver.stopping.max_sweeps, int)
        solver = replace(solver, stopping=jf.MaxSweeps(solver.stopping.max_sweeps - less))
        x = jf.solve(found.flow.blocks[block], path[block].z, solver).x
        return float((x - path[block].answer).abs().max())

    easy = [block for block in range(3) if block != tough]
    assert off(tough, 0) <= tolerance < off(tough, 1)
    assert max(off(block, 0) for block in easy) <= tolerance < max(off(block, 1) for block in easy)


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_a_real_report_gives_the_cheapest_plan_too(flow: tuple[int, float], per_segment: bool) -> None:
    report = calibrated(*flow).report
    (tough,) = report.tough_blocks
    chosen = set()
    for tolerance in TOLERANCES:
        measured = {
            count: [row.sweeps[tolerance] for row in rows] for count, rows in report.segment_traces[tough].items()
        }
        for call_cost in (0.0, 1.0, 4.0, 5.0, 32.0, 1e4):
            strategy = jf.Strategy.from_report(report, tolerance, per_segment=per_segment, call_cost=call_cost)
            plans = affordable(report.num_tokens, call_cost, measured, per_segment)
            solver = strategy.solvers[tough]
            assert isinstance(solver.partition, jf.Segments)
            plan = next(p for p in plans if (p.count, p.sweeps) == (solver.partition.count, solver.stopping.max_sweeps))
            assert math.isclose(plan.cost, min(p.cost for p in plans))
            assert [s.guess for s in strategy.solvers] == [report.guess(block) for block in range(3)]
            chosen.add(plan.count)
    assert chosen >= {1, report.num_tokens}


def test_a_report_from_a_file_proposes_the_same(tmp_path: Path) -> None:
    report = calibrated(*FLOWS[0]).report
    report.save(tmp_path / "report.json")
    loaded = jf.Report.load(tmp_path / "report.json")
    for per_segment in (False, True):
        assert jf.Strategy.from_report(loaded, per_segment=per_segment) == jf.Strategy.from_report(
            report, per_segment=per_segment
        )
    assert jf.Strategy.parse("jacobi", loaded) == jf.Strategy.parse("jacobi", report)


def test_a_strategy_of_another_flows_report_is_refused(tmp_path: Path) -> None:
    """However it was made, from a file too; one without a report is for any flow."""
    small, large = (calibrated(*flow) for flow in FLOWS)
    for strategy in (
        jf.Strategy.parse("Jacobi-3", small.report),
        jf.Strategy.parse("jacobi", small.report).with_tolerance(1e-2),
        jf.Strategy.from_report(small.report),
    ):
        strategy.save(tmp_path / "strategy.json")
        loaded = jf.Strategy.load(tmp_path / "strategy.json")
        assert loaded.fingerprint == strategy.fingerprint == small.report.fingerprint
        strategy.check(small.flow)
        for refused in (strategy, loaded):
            with pytest.raises(ValueError, match=r"made for another flow.*calibrate this one"):
                jf.decode(large.flow, large.latents, strategy=refused)
    jf.Strategy.parse("jacobi", num_blocks=2, num_tokens=large.report.num_tokens).check(large.flow)
    with pytest.raises(ValueError, match="fingerprint 7"):
        jf.Strategy.from_json({**strategy.to_json(), "fingerprint": 7})
