"""A check of the files that a command writes, before its work."""

from __future__ import annotations

import os
from pathlib import Path

from jacobiflow.errors import InputValueError


def check_output(option: str, path: Path | None, *others: object) -> None:
    """Raises InputValueError if a file cannot be written, or lies where another option points.

    Args:
        option: The option that gives the file, for the message.
        path: The file.
        others: Values of other options. A `Path`, or the name of a file or a folder that exists, counts.
    """
    if path is None:
        return
    for other in others:
        is_path = isinstance(other, Path) or (isinstance(other, str) and os.path.exists(other))
        if is_path and path.resolve().is_relative_to(Path(str(other)).resolve()):
            raise InputValueError(f"{option} {path}: is in {other}, which this command uses; give another file")
    nearest = next(parent for parent in path.resolve().parents if parent.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputValueError(f"{option} {path}: cannot be written; give a file in a folder that can be")
