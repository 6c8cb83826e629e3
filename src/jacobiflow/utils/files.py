"""Atomic writes, locked folders, and JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jacobiflow.errors import InputValueError

LOCK = ".lock"
MANIFEST = "manifest.json"
_TEXT_OR_CONSTANT = re.compile(r'"(?:[^"\\]+|\\.)*"|Infinity|NaN')  # A text may contain the words Infinity and NaN.


@contextmanager
def atomic_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` at the end of the block.

    An error removes the temporary file. Its name, `.NAME.*.partial`, is random, so that threads, processes and
    machines on a shared disk do not collide. With `sync` the file also survives a loss of power.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:  # Windows cannot sync a file that is open for reading only.
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename in (str(partial), None):  # such as that of a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def write_atomically(path: str | Path, data: bytes | bytearray, sync: bool = True) -> None:
    """Writes `data` to `path` by `atomic_path`."""
    with atomic_path(path, sync) as partial:
        partial.write_bytes(data)


def remove_partials(folder: Path, pattern: str = "*") -> None:
    """Removes what killed processes have left: temporary files of `atomic_path` for files that match a glob pattern.

    Those of safetensors, which it renames to the temporary file of `atomic_path`, lie beside these.
    """
    name = Path(pattern).name
    for partial in (f".{name}.{16 * '[0-9a-f]'}.partial", f".tmp{6 * '[0-9A-Za-z]'}"):
        for path in sorted(folder.glob(str(Path(pattern).with_name(partial)))):
            path.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Parses the JSON in a file; raises ValueError for anything else."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputValueError(f"not JSON ({error})") from error


def read_object(path: str | Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None if the file cannot be read or is no JSON object."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON, see `json_bytes`."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Returns `value` as JSON. NaN becomes null. Infinity becomes 1e999, which Python and browsers read as infinity."""
    text = json.dumps(value, indent=1)
    constants = {"Infinity": "1e999", "NaN": "null"}
    return (_TEXT_OR_CONSTANT.sub(lambda match: constants.get(match[0], match[0]), text) + "\n").encode()


def cache_folder() -> Path | None:
    """Returns the cache folder of this user; None if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jacobiflow"
    except RuntimeError:
        return None


def sha256(*parts: bytes | bytearray | Path) -> str:
    """Returns the SHA-256 of bytes and files, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part)
    return digest.hexdigest()


class FolderInUseError(InputValueError):
    """Another process is writing to the folder."""


@contextmanager
def locked(path: Path, lock: str = LOCK, wait: float = 0) -> Iterator[None]:
    """Creates a folder and locks it against other processes until the block ends.

    Args:
        path: The folder.
        lock: Name of the file that is locked; it begins with `LOCK`.
        wait: Seconds to wait for another process that has locked it.

    Raises:
        FolderInUseError: If another process keeps it locked.
        OSError: If the folder cannot be created, or its file system has no locks.
    """
    # Without flock, a file that a killed process has left would lock the folder for ever.
    file = FileLock(path / lock, fallback_to_soft=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file.acquire(timeout=wait, poll_interval=0.2)
    except Timeout as error:
        raise FolderInUseError(
            f"{path}: another run is writing to it; wait for it, stop it, or give another folder"
        ) from error
    except OSError as error:
        reason = "no flock on its file system" if error.errno == errno.ENOSYS else error.strerror
        raise OSError(f"{path}: cannot be used as a folder ({reason}); give another folder") from error
    try:
        yield
    finally:
        file.release()
