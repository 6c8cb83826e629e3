"""Result files are completed step by step, of one machine and one code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import regimes
from benchmarks.lib import results
from benchmarks.lib.results import ResultFile, code_digest


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


def test_a_digest_is_of_statements_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    ignored = ("src/jacobiflow/cli/app.py", "benchmarks/regimes.py", "examples/card.md")
    names = ("benchmarks/speed.py", "benchmarks/features.py", "benchmarks/lib/a.py", "examples/b.py",
             "src/jacobiflow/native/c.h", "src/jacobiflow/bundled/d.json")  # fmt: skip

    def digest(**changed: str) -> str:
        for name, text in (dict.fromkeys(names + ignored, "1") | changed).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        code_digest.cache_clear()
        return code_digest("benchmarks.speed")

    assert {digest(), digest(**{names[0]: '"""Text."""\n1  # a comment'}, **dict.fromkeys(ignored, "2"))} == {digest()}
    assert len({digest(), *(digest(**{name: "2"}) for name in names)}) == 1 + len(names)
