"""Files appear whole or not at all, in a folder with one owner at a time: new, empty or its owner's own."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path
from unittest.mock import Mock

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
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'$"):
        files.append(Path("/dev/full"), "text")


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
    text = (tmp_path / "f").read_text()
    back = value | {"a": [1.5, math.inf, [-math.inf, None]]}
    assert json.loads(text, parse_constant=pytest.fail) == files.read_json(tmp_path / "f") == back
    assert files.json_bytes({"a": [1, 2.5]}, indent=None) == b'{"a":[1,2.5]}\n'
    (tmp_path / "g").write_bytes(b"\xef\xbb\xbf[1]")  # as an editor on Windows writes it
    assert files.read_json(tmp_path / "g") == [1]
    (tmp_path / "g").write_bytes(b"c")
    assert files.sha256(b"ab", b"", tmp_path / "g") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN"), ("[Infinity]", "Infinity"), ('{"a": [1, -Infinity]}', '-Infinity after "a"'),
        ('{"NaN": {"rate": NaN}}', 'NaN after "rate"'), ("{", "Expecting"), ("[" * 100_000, "maximum recursion"),
        ("9" * 5000, "Exceeds the limit"), ("\xff", "utf-8"), ('"a"'.encode("utf-16").decode("latin1"), "utf-8"),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_not_json_is_one_error(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(text.encode("latin1"))
    assert files.read_object(tmp_path / "f") is None
    with pytest.raises(InputValueError, match=rf"^not JSON \([^;]*{reason}[^;]*\)$"):
        files.read_json(tmp_path / "f")


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    """A pipe would wait for a writer without end."""
    os.mkfifo(tmp_path / "pipe")
    for read in (files.read_json, files.sha256, files.regular_file):
        with pytest.raises(OSError, match=r"Not a regular file: '.*pipe'"):
            read(tmp_path / "pipe")
    assert files.read_object(tmp_path / "pipe") is None


def test_one_process_at_a_time_and_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    for has_file in (False, True):
        with pytest.raises(KeyError), files.locked(out):
            with pytest.raises(files.FolderInUseError, match="another run is writing to"), files.locked(out):
                pass
            if has_file:
                (out / "file").touch()
            raise KeyError
        assert out.exists() == has_file


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock by a file that merely exists would outlive a process that is killed."""
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    message = r"/out: cannot be used as a folder \(no flock on its file system\); give another folder$"
    with pytest.raises(OSError, match=message), files.locked(tmp_path / "out"):
        pass


def test_a_command_writes_into_a_folder_that_is_new_empty_or_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        with files.output_directory(tmp_path / "out", "benchmark", ["bench.json"]):
            (tmp_path / "out" / "bench.json").write_text("{}")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == {"kind": "benchmark", "files": ["bench.json"]}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "bench.json").write_text("{}")
    for folder in ("out", "theirs"):
        words = f"{folder}: holds files that this command did not write; give a new or empty folder"
        with pytest.raises(ValueError, match=words), files.output_directory(tmp_path / folder, "evaluation", []):
            pass
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "benchmark"
    with pytest.raises(OSError, match=r"bench.json: cannot be used as a folder \(.*\); give another folder"):
        files.output_directory(tmp_path / "out" / "bench.json", "benchmark", []).__enter__()
