"""Kills of a process and damage of its files, and the files that are left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """The end of a process."""


@contextmanager
def killed(after: int) -> Iterator[None]:
    """Lets so many files be renamed, removed or extended; any further attempt raises `Killed`, in the clean-up, too.

    Half of a line is written if a file is extended at the kill.
    """
    left = after

    def wrap(kind: Any, name: str) -> Callable[..., Any]:
        change = getattr(kind, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            if name == "open" and args[1:] != ("a",):
                return change(*args, **options)
            left -= 1
            if left == -1 and name == "open":
                with change(*args) as file:
                    file.write('{"step": 3, "los')
            if left < 0:
                raise Killed
            return change(*args, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((os, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "open"), (shutil, "rmtree")):
            patch.setattr(kind, name, wrap(kind, name))
        yield


def flip(path: Path) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def read_files(folder: Path, without: Collection[str] = ()) -> dict[str, bytes]:
    """The content of all files except locks, by their names."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path.read_bytes() for name, path in paths.items() if not name.startswith(".lock") and name not in without
    }
