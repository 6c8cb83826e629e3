"""Folders that a command writes: one process at a time, in a folder that is new, empty or its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from jacobiflow.errors import InputValueError
from jacobiflow.files import read_object, write_json

LOCK = ".lock"
MANIFEST = "manifest.json"


class FolderInUseError(InputValueError):
    """Another process is writing to the folder."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes out of it until the block ends, or this process is killed.

    After an error, a new folder without files is removed.
    """
    lock, is_new = FileLock(path / LOCK), not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUseError(
            f"{path}: another run is writing to it; wait for it, stop it, or give another folder"
        ) from error
    except OSError as error:
        raise OSError(f"{path}: cannot be used as a folder ({error.strerror}); give another folder") from error
    try:
        yield
    except BaseException:
        if is_new and [entry.name for entry in path.iterdir()] == [LOCK]:
            with suppress(OSError):  # Windows removes no open file
                (path / LOCK).unlink()
                path.rmdir()
        raise
    finally:
        lock.release()


@contextmanager
def own_folder(path: Path, kind: str, files: Sequence[str]) -> Iterator[None]:
    """Locks a folder that is new, empty or its own: that has a manifest.json of this kind, such as "benchmark"."""
    check_own(path, kind)  # before there is a lock in it
    with locked(path):
        write_json(path / MANIFEST, {"kind": kind, "files": list(files)})
        yield


def check_own(path: Path, kind: str) -> None:
    """Raises ValueError if a folder has files, hidden ones apart, and no manifest of this kind."""
    manifest = read_object(path / MANIFEST) or {}
    if manifest.get("kind") != kind and path.is_dir() and not all(e.name.startswith(".") for e in path.iterdir()):
        raise InputValueError(f"{path}: holds files that this command did not write; give a new or empty folder")
