"""Result files are completed step by step, of one machine and one code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import results
from benchmarks.lib.results import ResultFile, code_digest


def measured(value: int) -> Callable[[Any], Any]:
    def measure(key: Any) -> Any:
        return {"value": value}

    measure.__module__ = "benchmarks.regimes"
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


def test_a_digest_is_of_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PACKAGE", tmp_path / "package")
    texts = {"benchmarks/speed.py": "x = 1", "benchmarks/lib/a.py": "", "package/b.py": "", "package/native/c.h": "",
             "package/cli/d.py": ""}  # fmt: skip

    def digest(**changed: str) -> str:
        for name, text in (texts | changed).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for function in (code_digest, results._file_digest):
            function.cache_clear()
        return code_digest("benchmarks.speed")

    first = digest()
    same = [{"benchmarks/speed.py": '"""Text."""\nx = 1  # a comment'}, {"package/cli/d.py": "x = 1"}]
    assert {digest(**changed) for changed in same} == {first}
    others = [{name: "y = 2"} for name in texts if "cli" not in name]
    assert len({first, *(digest(**changed) for changed in others)}) == 5
