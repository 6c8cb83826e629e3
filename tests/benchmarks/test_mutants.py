"""benchmarks/mutants.py: faults are where they count, and the tests of a small tree kill the right ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.faults import places
from benchmarks.mutants import Part, examine

HALF = """
from __future__ import annotations

Number = int | float


def half(x: int | None = 0) -> Number | None:
    \"\"\"Half of 2 is 1.\"\"\"
    if not isinstance(x, int | float):
        raise TypeError(f"{x + 1} is not a number" + "!")
    return x / 2
"""
TESTS = """
from jacobiflow.solvers import half


def test_half():
    assert half(4) == 2
"""


def test_faults_change_a_result() -> None:
    lines = HALF.splitlines()
    faults = [
        (lines[mutant.line - 1].strip(), mutant.apply(HALF).splitlines()[mutant.line - 1].strip())
        for place in places(HALF, "half.py")
        for mutant in place
    ]
    default = "def half(x: int | None = 0) -> Number | None:"
    test = "if not isinstance(x, int | float):"
    assert {before for before, _ in faults} == {default, test, "return x / 2"}
    assert ("return x / 2", "return x * 2") in faults
    assert ("return x / 2", "return x / 3") in faults
    assert (default, default.replace("0", "1")) in faults
    assert (test, "if  isinstance(x, int | float):") in faults
    assert all("int | " in after or after.startswith("return x ") for _, after in faults), "types stay as they are"


@pytest.mark.skipif(sys.platform == "win32", reason="limits memory as Unix does")
def test_mutants_of_a_small_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, progress = tmp_path / "root", tmp_path / "progress.json"
    source, tests = root / "src" / "jacobiflow" / "solvers", root / "tests"
    source.mkdir(parents=True)
    tests.mkdir()
    (source.parent / "__init__.py").touch()
    (source / "__init__.py").write_text(HALF)
    (tests / "test_half.py").write_text(TESTS)
    parts = {"solvers": Part("src/jacobiflow/solvers", "tests", 100)}
    result = examine(root, parts, progress)["solvers"]
    # The condition, which has two places, the division and the 2 are tested; the default of x is not.
    (survivor,) = result["survivors"]
    assert survivor["line"] == HALF[: HALF.index("def")].count("\n") + 1
    assert (result["places"], result["total"], result["killed"]) == (5, 5, 4)
    assert capsys.readouterr().out.count(" tests/test_half.py::test_half") == 4
    assert examine(root, parts, progress)["solvers"] == result
    assert capsys.readouterr().out == "", "everything is in the file of an earlier run"
