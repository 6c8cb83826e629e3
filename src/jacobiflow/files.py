"""Writing files that appear whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def write_beside(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` at the end of the block; after an error nothing is left.

    Its name, `.NAME.*.partial`, is another one each time, so that threads, processes and machines that share a disk do
    not meet.

    **Raises** `OSError` where that is not possible.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
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
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode()


def sha256(*parts: bytes) -> str:
    """SHA-256 of bytes, one part after another, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def finite(value: Any) -> Any:
    """A JSON value with null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensor_to_json(values: Tensor) -> dict[str, Any]:
    """A JSON value that `tensor_from_json` turns back into the same float32 values: shape, and bytes in base64."""
    array = values.detach().float().cpu().numpy().astype("<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def tensor_from_json(value: Any) -> Tensor:
    """Inverse of `tensor_to_json`. **Raises** `ValueError` where the value is none of its kind, or not finite."""
    try:
        shape = value["shape"]
        if set(value) != {"shape", "float32"} or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape!r}, entries {', '.join(value)}")
        array = np.frombuffer(base64.b64decode(value["float32"], validate=True), "<f4").reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an array of float32 values with its shape ({error})") from error
    if not np.isfinite(array).all():
        raise ValueError("an array that holds a NaN or an infinity")
    return torch.from_numpy(array.astype(np.float32))
