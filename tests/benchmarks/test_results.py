"""Result files are completed step by step, of one machine and one code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks import ROOT, maf, regimes
from benchmarks.lib import results
from benchmarks.lib.imports import imported_files
from benchmarks.lib.results import ResultFile, code_digest

BENCHMARK = """
from typing import TYPE_CHECKING
import jacobiflow as jf
from examples import b
if TYPE_CHECKING:
    from jacobiflow.hints import Hint
def measure():
    import benchmarks.lib.a
    return jf.sample()
"""
IMPORTED = {
    "benchmarks/speed.py": BENCHMARK, "benchmarks/lib/__init__.py": "", "benchmarks/lib/a.py": "", "examples/b.py": "",
    "src/jacobiflow/sampling/__init__.py": "from jacobiflow.sampling.draw import sample",
    "src/jacobiflow/sampling/draw.py": "", "src/jacobiflow/native/c.h": "", "src/jacobiflow/bundled/d.json": "",
}  # fmt: skip
OTHERS = {
    "src/jacobiflow/api.py": "from jacobiflow.sampling import sample\nfrom jacobiflow.training import train",
    "src/jacobiflow/training.py": "", "src/jacobiflow/hints.py": "", "src/jacobiflow/cli/app.py": "import jacobiflow",
    "benchmarks/regimes.py": "", "examples/c.py": "", "examples/card.md": "",
}  # fmt: skip


def measured(value: int) -> Callable[[Any], Any]:
    def measure(key: Any) -> Any:
        return {"value": value}

    measure.__module__ = regimes.__name__
    return measure


def complete(path: Path, names: str, value: int) -> list[tuple[str, int]]:
    measure = measured(value)
    with ResultFile(path, measure) as file:
        rows = [file.row({"name": name}, measure) for name in names]
    content = json.loads(path.read_text())
    assert content["command"] == "python -m benchmarks.regimes"
    assert content["runs"] == rows
    return [(row["name"], row["value"]) for row in rows]


def test_rows_in_the_file_are_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "new/result.json"
    assert complete(path, "a", 1) == [("a", 1)]
    assert complete(path, "ab", 2) == [("a", 1), ("b", 2)]
    content = json.loads(path.read_text())
    content["runs"][0]["code"] = "another"
    path.write_text(json.dumps(content))
    assert complete(path, "ab", 3) == [("a", 3), ("b", 2)]
    assert complete(path, "b", 4) == [("b", 2)]


def test_a_stopped_benchmark_keeps_its_rows(tmp_path: Path) -> None:
    complete(tmp_path / "result.json", "ab", 1)
    with pytest.raises(KeyboardInterrupt), ResultFile(tmp_path / "result.json", measured(2)) as file:
        file.row({"name": "a"}, measured(2))
        raise KeyboardInterrupt
    assert complete(tmp_path / "result.json", "ab", 2) == [("a", 1), ("b", 1)]


def test_rows_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    complete(path, "a", 1)
    old = json.loads(path.read_text()) | {"machine": "another"}
    path.write_text(json.dumps(old))
    with pytest.raises(SystemExit, match=r"is of another, and this machine is .*: remove the file"):
        complete(path, "a", 2)
    assert json.loads(path.read_text()) == old


def test_the_machine_is_checked_before_a_flow_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maf.json").write_text(json.dumps({"machine": "another", "runs": []}))
    monkeypatch.setattr(maf, "trained", Mock(side_effect=AssertionError("trains")))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["maf"])
    with pytest.raises(SystemExit, match="is of another, and this machine is"):
        maf.main()


def test_a_digest_is_of_the_statements_of_imported_modules_and_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)

    def digest(names: Iterable[str] = (), more: str = "\nx = 2\n") -> str:
        for name, text in (IMPORTED | OTHERS).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + more * (name in names))
        code_digest.cache_clear()
        return code_digest("benchmarks.speed")

    assert {digest(), digest(OTHERS), digest(["benchmarks/speed.py"], "\n# a comment")} == {digest()}
    assert len({digest(), *(digest([name]) for name in IMPORTED)}) == 1 + len(IMPORTED)


def test_a_digest_covers_the_functions_that_run(tmp_path: Path) -> None:
    """Functions that run once all is imported are in modules that the statements lead to."""
    probe = tmp_path / "benchmarks/probe.py"
    probe.parent.mkdir()
    (tmp_path / "src").symlink_to(ROOT / "src")
    probe.write_text("import jacobiflow as jf\njf.sample(jf.load('digits-p1'), 2, strategy='gs-jacobi:2', seed=1)\n")
    program = (
        "import sys; from jacobiflow import api; files = set()\n"
        "sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))\n"
        f"exec(open({str(probe)!r}).read())\n"
        "sys.setprofile(None); print('\\n'.join(files))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    line = [sys.executable, "-c", program]
    printed = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    run = {Path(name) for name in printed.splitlines() if name.startswith(str(ROOT / "src"))}
    covered = {path.resolve() for path in imported_files("benchmarks.probe", tmp_path)}
    assert len(run) > 20 and run <= covered, run - covered


def test_a_command_is_in_the_digest_of_no_benchmark_that_does_not_run_it() -> None:
    package, cli = ROOT / "src/jacobiflow", ROOT / "src/jacobiflow/cli"
    files = {script: imported_files(f"benchmarks.{script}", ROOT) for script in ("performance", "estimators", "maf")}
    assert not any(path.is_relative_to(cli) for path in files["performance"] | files["estimators"])
    assert not any(path.is_relative_to(package / "sampling") for path in files["estimators"])
    assert {cli / "train.py", package / "training/trainer.py"} <= files["maf"]
