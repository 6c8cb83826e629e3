"""Strategies as data, by name, and in the notation of the GS-Jacobi paper's tables."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.solvers import Given, Stopping
from jacobiflow.strategy import resolve

many = settings(max_examples=150, deadline=None, derandomize=True)

DEFAULT = 1e-3
JACOBI_10 = jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(10))

counts = st.integers(1, 10**6)
solvers = st.builds(
    jf.Solver,
    st.one_of(
        st.just(jf.Sequential()), st.just(jf.Whole()), st.builds(jf.Segments, counts), st.builds(jf.Window, counts)
    ),
    st.sampled_from([jf.Latent(), jf.Zeros()]),
    st.one_of(
        st.builds(jf.Tolerance, st.floats(0, 1e300)),
        st.builds(jf.MaxSweeps, counts),
        st.builds(Stopping, st.floats(0, 1e300), counts),
    ),
)
strategies = st.lists(solvers, min_size=1, max_size=5).map(lambda found: jf.Strategy(tuple(found)))


def gs_jacobi(count: int, sweeps: int) -> jf.Solver:
    return jf.Solver(jf.Segments(count), stopping=jf.MaxSweeps(sweeps))


# ---------------------------------------------------------------------------------------------------------- as data


@given(strategies)
@many
def test_json_and_back(strategy: jf.Strategy) -> None:
    text = json.dumps(strategy.to_json(), allow_nan=False)
    assert jf.Strategy.from_json(json.loads(text)) == strategy


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


def test_a_piece_without_a_json_form_is_refused() -> None:
    import torch

    strategy = jf.Strategy.uniform(jf.Solver(guess=Given(torch.zeros(1, 2, 3))), 2)
    with pytest.raises(ValueError, match="Given"):
        strategy.to_json()


GOOD = jf.Strategy((jf.Solver(jf.Segments(4), jf.Zeros(), Stopping(1e-3, 5)), jf.Solver(jf.Window(3)))).to_json()
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
]


def put(value: Any, path: list[Any], new: Any) -> Any:
    value = copy.deepcopy(value)
    place = value
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = new
    return value


@pytest.mark.parametrize(("path", "new", "names"), WRONG, ids=[f"{path}={new}" for path, new, _ in WRONG])
def test_malformed_json_is_a_value_error_that_names_the_place(path: list[Any], new: Any, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        jf.Strategy.from_json(put(GOOD, path, new))


PLACES: list[list[Any]] = [
    ["format_version"], ["blocks"], ["blocks", 0], ["blocks", 0, "partition"], ["blocks", 0, "partition", "kind"],
    ["blocks", 0, "partition", "count"], ["blocks", 0, "guess"], ["blocks", 0, "guess", "kind"],
    ["blocks", 0, "correction"], ["blocks", 0, "stopping"], ["blocks", 0, "stopping", "atol"],
    ["blocks", 0, "stopping", "max_sweeps"], ["blocks", 0, "partition", "extra"],
]  # fmt: skip
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
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


def test_auto_is_some_strategy_to_the_tolerance() -> None:
    assert all(solver.stopping == jf.Tolerance(1e-5) for solver in resolve("auto", 3, 16, 1e-5).solvers)
    assert all(solver.stopping == jf.Tolerance(DEFAULT) for solver in resolve("auto", 3, 1, None).solvers)


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


pieces = st.sampled_from(
    [
        "[",
        "]",
        "-",
        "/",
        "7",
        "0",
        "12",
        "jacobi",
        "gs-jacobi",
        "window",
        ":",
        "auto",
        "original",
        ".json",
        " ",
        "x",
        "²",
    ]
)


@given(text=st.text() | st.lists(pieces, max_size=9).map("".join) | st.from_regex(r"\[\d(/\d)?(-\d+(/\d+)?){2}-\d+\]"))
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
