"""Writing files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_INFINITY = re.compile(r'"(?:[^"\\]+|\\.)*"|Infinity|NaN')  # or a text, which may contain these words


@contextmanager
def write_beside(path: str | Path, sync: bool = True) -> Iterator[Path]:
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
    """Writes `data` to `path` as `write_beside` does."""
    with write_beside(path, sync) as partial:
        partial.write_bytes(data)


def partials(folder: Path, name: str = "*") -> list[Path]:
    """Returns the half-written files of `name` in a folder that killed processes have left."""
    return sorted(folder.glob(f".{name}.{16 * '[0-9a-f]'}.partial"))


def remove_partials(folder: Path) -> None:
    """Removes what `partials` returns."""
    for path in partials(folder):
        path.unlink(missing_ok=True)


def read_object(path: str | Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file; None if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Writes `value` as `json_bytes` returns it."""
    write_atomically(path, json_bytes(value, indent))


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """Returns `value` as JSON, on one line if `indent` is None.

    NaN becomes null. Infinity becomes 1e999, a number that every reader takes for infinity.
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


def sha256(*parts: bytes | bytearray) -> str:
    """Returns the SHA-256 of bytes, one part after another, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def files_sha256(*paths: Path) -> str:
    """Returns the SHA-256 of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
