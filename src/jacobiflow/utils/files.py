"""Files that appear whole or not at all, in folders that one process at a time writes to."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jacobiflow.errors import InputValueError

LOCK = ".lock"
MANIFEST = "manifest.json"
_INFINITY = re.compile(r'"(?:[^"\\]+|\\.)*"|Infinity|NaN')  # or a text, which may contain these words


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and renames it to `path` at the end of the block.

    After an error nothing is left. The partial file, `.NAME.*.partial`, has another name each time, so that no two
    threads, processes or machines on a shared disk write to the same file. With `sync` the content is on the disk
    before the rename, so that a loss of power leaves a whole file too.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:  # Windows takes no file that is open for reading only
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename in (str(partial), None):  # None: the disk is full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def write_atomically(path: str | Path, data: bytes | bytearray, sync: bool = True) -> None:
    """Writes `data` to `path` as `atomic_path` does."""
    with atomic_path(path, sync) as partial:
        partial.write_bytes(data)


def partials(folder: Path, name: str = "*") -> list[Path]:
    """Returns the half-written files of `name` in a folder that killed processes have left."""
    return sorted(folder.glob(f".{name}.{16 * '[0-9a-f]'}.partial"))


def remove_partials(folder: Path) -> None:
    """Removes what `partials` returns."""
    for path in partials(folder):
        path.unlink(missing_ok=True)


def regular_file(path: str | Path) -> Path:
    """Returns `path`. Raises OSError if it is not a file, but for example a pipe, on which a reader would wait."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path


def parse_json(data: bytes) -> Any:
    """Parses JSON as `json_bytes` writes it. Raises ValueError for anything else, also for NaN and Infinity."""
    try:
        return json.loads(data, parse_constant=int)  # which refuses NaN and Infinity
    except (ValueError, RecursionError) as error:  # ValueError: also for a whole number of thousands of digits
        raise InputValueError(f"not JSON ({str(error).partition(';')[0]})") from error


def read_json(path: str | Path) -> Any:
    """Parses the JSON in a file."""
    return parse_json(regular_file(path).read_bytes())


def read_object(path: str | Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None if there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Writes `value` as `json_bytes` returns it."""
    write_atomically(path, json_bytes(value, indent))


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """Returns `value` as JSON, on one line if `indent` is None.

    NaN becomes null. Infinity becomes 1e999, which is JSON. `parse_json` reads it as infinity, as Python and browsers
    do; other parsers may refuse a number of this size.
    """
    text = json.dumps(value, indent=indent, separators=(",", ":") if indent is None else None)
    words = {"Infinity": "1e999", "NaN": "null"}
    return (_INFINITY.sub(lambda match: words.get(match[0], match[0]), text) + "\n").encode()


def cache_folder() -> Path | None:
    """Returns the folder of this user's cache; None if the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jacobiflow"
    except RuntimeError:
        return None


def sha256(*parts: bytes | bytearray | Path) -> str:
    """Returns the SHA-256 of bytes and files, one part after another, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(regular_file(part).read_bytes() if isinstance(part, Path) else part)
    return digest.hexdigest()


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
def output_directory(path: Path, kind: str, files: Sequence[str]) -> Iterator[None]:
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
