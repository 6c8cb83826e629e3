"""Faults are where they can change a result, and tests of a small tree kill the right ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.mutation.mutants import Part, examine

HALF = """
from __future__ import annotations

Number = int | float


def half(x: int | None = 0) -> Number | None:
    if not isinstance(x, int | float):
        raise TypeError(f"{x + 1} is not a number" + "!")
    return x / 2
"""


@pytest.mark.slow
def test_mutants_of_a_small_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, progress = tmp_path / "root", tmp_path / "progress.json"
    for file, text in (
        ("src/jacobiflow/__init__.py", HALF),
        ("tests/test_half.py", "from jacobiflow import half\n\n\ndef test_half():\n    assert half(4) == 2\n"),
    ):
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(text)
    parts = {"solvers": Part("src/jacobiflow", "tests", 100)}
    result = examine(root, parts, progress)["solvers"]
    # The condition, which has two places, the division and the 2 are tested; the default of x is not.
    assert [survivor["line"] for survivor in result["survivors"]] == [7]
    assert (result["places"], result["total"], result["killed"]) == (5, 5, 4)
    assert capsys.readouterr().out.count(" tests/test_half.py::test_half") == 4
    assert examine(root, parts, progress)["solvers"] == result
    assert capsys.readouterr().out == "", "everything is in the file of an earlier run"
