"""Files appear whole or not at all, in a folder with one owner at a time: new, empty or its owner's own."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from jacobiflow.errors import InputValueError
from jacobiflow.utils import files


def test_writers_of_one_file_do_not_meet_and_it_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with files.atomic_path(str(path)) as one:
        with files.atomic_path(path) as two:
            one.write_text("one")
            two.write_text("two")
            assert all(partial.match(".f.json.*.partial") and partial.parent == tmp_path for partial in (one, two))
            assert not path.exists()
        assert (path.read_text(), one.read_text()) == ("two", "one")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["f.json"]


def test_an_error_leaves_the_file_as_it_was_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("before")
    with pytest.raises(KeyError), files.atomic_path(path) as partial:
        partial.write_text("half")
        raise KeyError
    (tmp_path / "folder").mkdir()
    for wrong in (tmp_path / "folder", tmp_path / "missing" / "f"):
        with pytest.raises(OSError) as caught:
            files.write_atomically(wrong, b"bytes")
        assert (caught.value.filename, caught.value.filename2) == (str(wrong), None)
    assert path.read_text() == "before"
    with pytest.raises(OSError, match=r"No space left on device: '.*/f'$"), files.atomic_path(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    rename, path = os.replace, tmp_path / "f"
    monkeypatch.setattr(os, "fsync", lambda opened: steps.append(os.fstat(opened).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), rename(*names)))
    files.write_atomically(path, b"bytes")
    assert (steps, path.read_bytes()) == ([5, "rename"], b"bytes")
    files.write_atomically(path, b"others", sync=False)
    assert (steps[2:], path.read_bytes()) == (["rename"], b"others")


def test_json_is_indented_and_without_infinities(tmp_path: Path) -> None:
    value = {"a": [1.5, math.inf, (-math.inf, math.nan)], "b": {"c": 'é "Infinity', "NaN": None, "e": True}}
    files.write_json(tmp_path / "f", value)
    back = value | {"a": [1.5, math.inf, [-math.inf, None]]}
    assert json.loads((tmp_path / "f").read_text(), parse_constant=pytest.fail) == back
    assert files.read_object(tmp_path / "f") == back
    assert files.json_bytes({"a": [1, 2.5]}) == b'{\n "a": [\n  1,\n  2.5\n ]\n}\n'
    (tmp_path / "g").write_bytes(b"{c")
    assert files.sha256(b"ab", b"", tmp_path / "g") == hashlib.sha256(b"ab{c").hexdigest()
    assert files.read_object(tmp_path / "g") is None
    with pytest.raises(InputValueError, match=r"^not JSON \(Expecting"):
        files.read_json(tmp_path / "g")


def test_one_process_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    for _ in range(2):
        with pytest.raises(KeyError), files.locked(out):
            with pytest.raises(files.FolderInUseError, match="another run is writing to"), files.locked(out):
                pass
            raise KeyError


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    files.write_json(tmp_path / files.MANIFEST, {})
    with pytest.raises(OSError, match=r"json: cannot be used as a folder \(.*\); give another folder"):
        files.locked(tmp_path / files.MANIFEST).__enter__()
