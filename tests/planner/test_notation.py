"""Strategies as text: names, added pieces, and the paper's [Stack-GS-J-Else]; to solvers and back."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.utils.checks import format_value
from tests.helpers.invented import Halfway, Stretched, counted

L = 6  # blocks where a test needs some


def gs(count: int, sweeps: int | tuple[int, ...]) -> jf.Solver:
    return counted(jf.Segments(count), sweeps)


def parse(text: str, blocks: int = L) -> jf.Strategy:
    return jf.Strategy.parse(text, num_blocks=blocks)


NAMES: dict[str, jf.Solver] = {
    "sequential": jf.Solver(jf.Sequential()),
    "Original": jf.Solver(jf.Sequential()),
    "jacobi": jf.Solver(jf.Whole()),
    "JACOBI-30": counted(jf.Whole(), 30),
    "gs-jacobi:8": jf.Solver(jf.Segments(8)),
    "GS-Jacobi:8-32": gs(8, 32),
    " window:1000\n": jf.Solver(jf.Window(1000)),
    "stretched:3": jf.Solver(Stretched(3, 2)),
    "Stretched:3-5": jf.Solver(Stretched(3, 5)),
    "jacobi+zeros": jf.Solver(jf.Whole(), jf.Zeros()),
    "jacobi-9+zeros+halfway:50": replace(counted(jf.Whole(), 9), guess=Halfway(50)),
    "window:8+Halfway:50+latent": jf.Solver(jf.Window(8), jf.Latent()),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    tolerance = None if re.search("-(30|32|9)", name) else 1e-3  # numbers of sweeps
    assert parse(name) == jf.Strategy((NAMES[name],) * L, tolerance=tolerance)


TABLES = """
Jacobi-30 [6-1024-1-8] [6-1-128-10] [0/6-1024-1-30] [0/6-16-8-20] [7-4-64-10]
[0/7-256-1-6] [0/7-256/8-1/13-6] [0/7-16/8-12/13-6] [7-4-25,13,12,11-10] [0/7-1/2-9/8,7-6]
"""  # forms of Tables 3 and 4 of the paper, and counts per segment; the flows have 8 blocks


@pytest.mark.parametrize("text", TABLES.split())
def test_the_notations_of_the_paper_s_tables(text: str) -> None:
    """Section 3.4: stacked blocks get GS segments of at most J sweeps, the others at most Else; printed as they are."""
    want = [counted(jf.Whole(), int(text.strip("[]").split("-")[-1]))] * 8
    if text.startswith("["):
        stack, segments, sweeps, _ = (field.split("/") for field in text.strip("[]").split("-"))
        for i, block in enumerate(stack):
            each = tuple(map(int, sweeps[i % len(sweeps)].split(",")))
            want[int(block)] = gs(int(segments[i % len(segments)]), each if len(each) > 1 else each[0])
    assert parse(text, 8) == jf.Strategy(tuple(want), tolerance=None)


def test_a_notation_has_equals() -> None:
    for text, same in (
        ("[0/2-8/8-3/3-5]", "[0/2-8-3-5]"), ("[2/0-8/8-3/4-5]", "[0/2-8-4/3-5]"), ("segments:8", "gs-jacobi:8"),
        ("whole+zeros+latent+halfway:50", "jacobi+halfway:50"),
    ):  # fmt: skip
        assert parse(text, 3) == parse(same, 3)


def test_a_strategy_prints_its_blocks() -> None:
    strategy = parse("[0-2-3-4]", 2)
    assert str(strategy).splitlines() == [f"block {i}: {solver}" for i, solver in enumerate(strategy.solvers)]


UNKNOWN = [
    "", "newton", "7-8-32-10", "jacobi-", "jacobi-3-4", "Jacobi-٣", "jacobi-" + "9" * 99, "window", "window:3-4",
    "window:³", "jacobi+", "jacobi+window:3", "jacobi+zeros:1", "mean_affine",
]  # fmt: skip
MALFORMED: list[tuple[str, str]] = [
    *((text, "unknown; ") for text in UNKNOWN),
    ("AUTO:1e-2 ", "is planned for a flow, a device and a batch"),
    ("sequential:int16", 'is no strategy any more; give "sequential"'),
    *((text, "give whole numbers [Stack-GS-J-Else]") for text in (
        "[]", "[7-8-32]", "[7-8-32-10", "[7/-8-32-10]", "[7-8,8-32-10]", "[7-8-3²-10]", "[7-8-32-10\n]",
        "[7-8-32-10/20]")),
    ("[8-8-32-10]", "Stack 8: give blocks from 0 to 7"), ("[0/7/00-8-32-10]", "Stack 0/7/00: give blocks"),
    ("[0/1/2-1/2-32-10]", "GS 1/2: give one number, or one"), ("[0/7-8-1/2/3-10]", "J 1/2/3: give one number, or one"),
    ("[7-4-3,2-1]", "2 sweep counts for Segments(count=4)"), ("[7-2-3,0-1]", "sweeps=0: give a positive whole number"),
    ("jacobi+plain", "the piece 'plain' of a solver is retired; jacobiflow 0.1.0 is the last version with it;"),
    ("gs-jacobi:0", "count=0"),
    ("window:0", "Window: size=0"), ("stretched:0-3", "first=0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "at"), MALFORMED)
def test_malformed_text_is_refused_with_the_part_at_fault(text: str, at: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text, 8)
    assert str(caught.value).startswith(f"strategy {format_value(text)}: ")
    assert at in str(caught.value)


parts = st.sampled_from(
    ["[", "]", "-", "/", ",", "7", "0", "12", "jacobi", "gs-jacobi", "window", ":", "auto", "original", "+", "zeros",
     "halfway:9", "stretched", " ", "x", "²", "٣", "\n", "[5-8-32-10]", ".", "９" * 20, "9" * 20, "\0", "K"]
)  # fmt: skip
any_text = st.one_of(
    st.text(),
    st.lists(parts, max_size=9).map("".join),
    st.from_regex(
        r"\[[0-7](/[0-7]){0,2}-[0-9]{1,2}(/[0-9]{1,2}){0,2}-[0-9]{1,2}(,[0-9])?-[0-9]{1,2}\]", fullmatch=True
    ),
    st.from_regex(r"(jacobi-|gs-jacobi:|window:)\d{1,3}(-\d{1,3})?(\+zeros)?", fullmatch=True),
)


@given(text=any_text)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Numbers are those of ASCII."""
    with suppress(jf.InputError):
        assert len(parse(text, 6).solvers) == 6
        assert not any(char.isdigit() and not char.isascii() for char in text)
