"""Files appear whole or not at all, whoever else writes them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from jacobiflow.files import json_bytes, sha256, write_atomically, write_beside, write_json


def test_writers_of_one_file_do_not_meet_and_it_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with write_beside(str(path)) as one:
        with write_beside(path) as two:
            one.write_text("one")
            two.write_text("two")
            assert all(partial.match(".f.json.*.partial") and partial.parent == tmp_path for partial in (one, two))
            assert not path.exists()
        assert (path.read_text(), one.read_text()) == ("two", "one")
    assert path.read_text() == "one"
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert os.listdir(tmp_path) == ["f.json"]


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("before")
    with pytest.raises(KeyError), write_beside(path) as partial:
        partial.write_text("half")
        raise KeyError
    with pytest.raises(OSError), write_beside(path):
        pass  # nothing was written
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["f"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "f", b"")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere folders have no fsync")
def test_content_is_on_the_disk_before_the_rename_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    rename, fsync, path = os.replace, os.fsync, tmp_path / "f"

    def sync(opened: int) -> None:
        status = os.fstat(opened)
        done.append("folder" if os.path.samestat(status, os.stat(tmp_path)) else status.st_size)
        fsync(opened)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    write_atomically(path, b"bytes")
    assert done == [5, "rename", "folder"]
    write_atomically(path, b"others", sync=False)
    assert (done[3:], path.read_bytes()) == (["rename"], b"others")


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    """Not the half-written one, which is gone."""
    (tmp_path / "f").mkdir()
    for path in (tmp_path / "f", tmp_path / "missing" / "f"):
        with pytest.raises(OSError) as caught:
            write_atomically(path, b"bytes")
        assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert os.listdir(tmp_path) == ["f"]


def test_json_is_indented_and_without_infinities(tmp_path: Path) -> None:
    value = {"a": [1.5, math.inf, (-math.inf, math.nan)], "b": {"c": "é Infinity", "d": None, "e": True, "f": 10**20}}
    write_json(tmp_path / "f", value)
    text = (tmp_path / "f").read_text()
    assert text.encode() == json_bytes(value)
    assert json.loads(text, parse_constant=pytest.fail) == value | {"a": [1.5, math.inf, [-math.inf, None]]}
    assert text.count("\n ") == 14
    assert sha256(b"ab", b"", b"c") == hashlib.sha256(b"abc").hexdigest()
    assert json_bytes({"a": [1, 2.5]}, indent=None) == b'{"a":[1,2.5]}\n'
