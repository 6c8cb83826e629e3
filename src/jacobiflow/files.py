"""Writing files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jacobiflow.errors import InputValueError

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial", re.DOTALL)


@contextmanager
def write_beside(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` at the end of the block; after an error nothing is left.

    Its name, `.NAME.*.partial`, is another one each time, so that no two threads, processes or machines on a shared
    disk write to the same file. The content is on the disk before the rename, and the name after it, so that a loss of
    power leaves a whole file too; `sync=False` does without, for many small files that have a checksum elsewhere.

    **Raises** `OSError`, which names `path`, if that is not possible.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:  # Windows takes no file that is open for reading only
                os.fsync(file.fileno())
        os.replace(partial, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        if error.filename == str(partial):  # which is gone
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Windows and some network disks cannot; the files are whole anyway."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_atomically(path: str | Path, data: bytes | bytearray, sync: bool = True) -> None:
    """Write `data` to `path` as `write_beside` does. **Raises** `OSError` if that is not possible."""
    with write_beside(path, sync) as partial:
        partial.write_bytes(data)


def partials(folder: Path, name: str = "*") -> list[Path]:
    """The files that killed processes have left half-written of `name` in `folder`, by the names of `write_beside`."""
    return sorted(path for path in folder.glob(f".{name}.*.partial") if _PARTIAL.fullmatch(path.name))


def remove_partials(folder: Path) -> None:
    """Remove the files that killed processes have left half-written in `folder`."""
    for path in partials(folder):
        path.unlink(missing_ok=True)


def check_regular(path: str | Path) -> None:
    """**Raises** `OSError` if there is no regular file at `path`. A pipe, for one, would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_object(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in a file; `None` where there is none."""
    try:
        check_regular(path)
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check_ours(path: str | Path, keys: Iterable[str]) -> None:
    """**Raises** `ValueError` where `path` is there, but is no JSON object with all of `keys`, as ours have them."""
    if os.path.lexists(path) and not set(keys) <= set(read_object(path) or ()):
        raise InputValueError(f"{path}: is not a file that jacobiflow wrote; move it away, or give another folder")


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON, atomically; NaN and infinity, which JSON lacks, as null. `indent=None`: on one line."""
    write_atomically(path, json_bytes(value, indent))


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """What `write_json` writes."""
    separators = (",", ":") if indent is None else None
    return (json.dumps(finite(value), indent=indent, separators=separators, allow_nan=False) + "\n").encode()


def cache_folder() -> Path | None:
    """Where what can be made again is kept for this user; `None` where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jacobiflow"
    except RuntimeError:
        return None


def sha256(*parts: bytes | bytearray) -> str:
    """SHA-256 of bytes, one part after another, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of regular files, one after another, which may be larger than the memory. **Raises** `OSError`."""
    digest = hashlib.sha256()
    for path in paths:
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def entries_sha256(entries: dict[str, Any]) -> str:
    """SHA-256 of the entries of a JSON object, whatever their order."""
    return sha256(json.dumps(finite(entries), sort_keys=True).encode())


def finite(value: Any) -> Any:
    """A JSON value with null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
