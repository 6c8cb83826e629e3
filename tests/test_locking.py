"""A folder has one owner at a time, and is new, empty or its owner's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jacobiflow.locking import FolderInUseError, locked, own_folder


def test_one_process_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "new" / "deep"):
            with locked(tmp_path):
                pass
            with pytest.raises(FolderInUseError, match="another run is writing to"), locked(tmp_path / "new" / "deep"):
                pass
            raise KeyError


def test_a_command_writes_into_a_folder_that_is_new_empty_or_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        with own_folder(tmp_path / "out", "benchmark", ["bench.json"]):
            (tmp_path / "out" / "bench.json").write_text("{}")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == {"kind": "benchmark", "files": ["bench.json"]}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "bench.json").write_text("{}")
    for folder in ("out", "theirs"):
        words = f"{folder}: holds files that this command did not write; give a new or empty folder"
        with pytest.raises(ValueError, match=words), own_folder(tmp_path / folder, "evaluation", []):
            pass
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "benchmark"
    with pytest.raises(OSError, match=r"bench.json: cannot be used as a folder \(.*\); give another folder"):
        own_folder(tmp_path / "out" / "bench.json", "benchmark", []).__enter__()


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
        raise KeyError
    assert (tmp_path / "new" / "file").exists()
