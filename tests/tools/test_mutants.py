"""Faults are where they can change a result, and tests of a small tree kill the right ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.mutants import examine_all

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
    root, out = tmp_path / "root", tmp_path / "out"
    for file, text in (
        ("src/jacobiflow/__init__.py", ""),
        ("src/jacobiflow/part/__init__.py", HALF),
        (
            "tests/part/test_half.py",
            "from jacobiflow.part import half\n\n\ndef test_half():\n    assert half(3) == 1.5\n",
        ),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    result = examine_all(root, {"part": 100}, out)
    # The condition, which has two places, the division and the 2 are tested; the default of x is not.
    assert (result["part"]["total"], result["part"]["killed"]) == (5, 4)
    (survivor,) = result["part"]["survivors"]
    assert "-def half(x: int | None = 0)" in survivor
    assert capsys.readouterr().out.count("part/__init__.py") == 5
    assert examine_all(root, {"part": 100}, out) == result
    assert capsys.readouterr().out == "", "everything is in the database of an earlier run"
    assert (root / "src/jacobiflow/part/__init__.py").read_text() == HALF
