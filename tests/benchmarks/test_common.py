"""Result files are completed step by step, of one machine and one code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sources
from benchmarks.common import complete


def test_results_in_the_file_are_not_measured_again(tmp_path: Path) -> None:
    out, keys = tmp_path / "new/result.json", [{"name": "a"}, {"name": "b"}]
    complete(out, keys[:1], measured(1))
    result = complete(out, keys, measured(2))
    assert [(run["name"], run["value"]) for run in result["runs"]] == [("a", 1), ("b", 2)]
    assert json.loads(out.read_text()) == result
    result["runs"][0]["code"] = "another"
    out.write_text(json.dumps(result))
    assert [run["value"] for run in complete(out, keys, measured(3))["runs"]] == [3, 2]
    assert result["command"] == "python -m benchmarks.regimes"


def test_rows_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = complete(out, [{"name": "a"}], measured(1))
    out.write_text(json.dumps(result | {"machine": "another"}))
    with pytest.raises(SystemExit, match=r"is of another, and this machine is .*: remove the file"):
        complete(out, [{"name": "a"}], measured(2))
    assert json.loads(out.read_text())["runs"] == result["runs"]


def measured(value: int) -> Callable[[Any], Any]:
    def measure(key: Any) -> Any:
        return {"value": value}

    measure.__module__ = "benchmarks.regimes"
    return measure


@pytest.mark.slow
def test_a_digest_is_of_the_statements_that_a_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in sources.FOLDERS.items()}
    monkeypatch.setattr(sources, "FOLDERS", folders)

    def digests() -> list[str]:
        for function in (sources.code_digest, sources._imports, sources._public_names):
            function.cache_clear()
        return [sources.code_digest(f"benchmarks.{name}") for name in ("masked_flows", "regimes")]

    def append(path: str, text: str) -> None:
        with (folders["jacobiflow"] / path).open("a") as file:
            file.write(text)

    masked, regime = digests()
    append("native/library.py", "# a comment\n")
    append("cli/sample.py", "x = 1\n")
    assert digests() == [masked, regime]
    append("adapters/zuko.py", "x = 1\n")
    changed, same = digests()
    assert changed != masked and same == regime
    append("native/src/chain.h", "// a comment\n")
    assert not {*digests()} & {changed, same}
