"""benchmarks/mutants.py: faults are made where they count, and the tests of a small tree kill the right ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from faults import places
from running import ROOT

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
import subprocess, sys
from jacobiflow.solvers import half


def test_half():
    assert half(4) == 2


def test_half_elsewhere():
    call = "from jacobiflow.solvers import half; assert half(4) == 2"
    subprocess.run([sys.executable, "-c", call], check=True, env={})


def test_that_fails():
    raise AssertionError
"""


def test_faults_are_made_where_they_change_what_is_computed():
    lines = HALF.splitlines()
    made = [
        (lines[mutant.line - 1].strip(), mutant.apply(HALF).splitlines()[mutant.line - 1].strip())
        for place in places(HALF, "half.py")
        for mutant in place
    ]
    default = "def half(x: int | None = 0) -> Number | None:"
    test = "if not isinstance(x, int | float):"
    assert {before for before, _ in made} == {default, test, "return x / 2"}
    assert ("return x / 2", "return x * 2") in made
    assert ("return x / 2", "return x / 3") in made
    assert (default, default.replace("0", "1")) in made
    assert (test, "if  isinstance(x, int | float):") in made
    assert all("int | " in after or after.startswith("return x ") for _, after in made), "types stay as they are"


@pytest.mark.skipif(sys.platform == "win32", reason="mutants run in forked processes")
def test_mutants_of_a_small_tree(tmp_path):
    source, tests = tmp_path / "src" / "jacobiflow" / "solvers", tmp_path / "tests"
    source.mkdir(parents=True)
    tests.mkdir()
    (source.parent / "__init__.py").touch()
    (source / "__init__.py").write_text(HALF)
    (tests / "test_half.py").write_text(TESTS)
    table = {"solvers": {"source": "src/jacobiflow/solvers", "tests": ["tests"], "count": 100}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    program = "import mutants; mutants.HEAVY = ('hypothesis',); mutants.main()"
    options = ["--root", tmp_path, "--table", tmp_path / "table.json", "--out", tmp_path / "found.json"]
    command = [sys.executable, "-c", program, *map(str, options), "--progress", str(tmp_path / "progress.json")]
    first, second = (
        subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["solvers"]
    assert found["failing_tests"] == ["tests/test_half.py::test_that_fails"]
    # The condition, which has two places, the division and the 2 are tested; the default of x is not.
    (survivor,) = found["survivors"]
    assert survivor["line"] == HALF[: HALF.index("def")].count("\n") + 1
    assert (found["places"], found["total"], found["killed"]) == (5, 5, 4)
    assert first.count("killed by tests/test_half.py::test_half") == 4
    assert "killed by" not in second, "nothing is left to do"
