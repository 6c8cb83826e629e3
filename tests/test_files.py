"""Files appear whole or not at all, whoever else writes them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from pathlib import Path

import pytest

from jacobiflow.files import finite, json_bytes, sha256, write_atomically, write_beside, write_json


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path, together, errors = tmp_path / "f", threading.Barrier(2), []

    def write(text: str) -> None:
        try:
            with write_beside(path) as partial:
                partial.write_text(text)
                together.wait(60)
                assert partial.read_text() == text
                together.wait(60)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert path.read_text() in ("one", "two")
    assert os.listdir(tmp_path) == ["f"]


def test_a_partial_file_is_known_by_its_name_and_renamed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with write_beside(str(path)) as partial:
        assert partial.match(".f.json.*.partial")
        assert partial.parent == tmp_path
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"


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


def test_json_is_indented_and_without_infinities(tmp_path: Path) -> None:
    value = {"a": [1.5, math.inf, (-math.inf, math.nan)], "b": {"c": "é", "d": None, "e": True, "f": 10**20}}
    want = {"a": [1.5, None, [None, None]], "b": {"c": "é", "d": None, "e": True, "f": 10**20}}
    assert finite(value) == want
    write_json(tmp_path / "f", value)
    assert (tmp_path / "f").read_bytes() == json_bytes(value) == (json.dumps(want, indent=1) + "\n").encode()
    assert json_bytes({"a": [1, 2.5]}, indent=None) == b'{"a":[1,2.5]}\n'


def test_sha256_is_of_the_parts_one_after_another() -> None:
    assert sha256(b"ab", b"", b"c") == sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert sha256() == hashlib.sha256().hexdigest()
