"""Writing files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def write_beside(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to it where the block ends well; nothing is left behind otherwise.

    **Raises** `OSError` where that is not possible.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all. **Raises** `OSError` where that is not possible."""
    with write_beside(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity, which JSON lacks, as null."""
    write_atomically(path, (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
