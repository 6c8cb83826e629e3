"""The files that each kind of job writes, and the folders that a command may write into."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from jacobiflow.errors import InputValueError
from jacobiflow.utils.files import MANIFEST, json_bytes, read_object

RECORDS = "units/*.json"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "samples": (
        "outcome.json", "strategy.json", "samples.png", f"shards/{5 * '[0-9]'}.npz", f"images/{8 * '[0-9]'}.png",
        f"images/*/{8 * '[0-9]'}.png",
    ),
    "evaluation": ("evaluation.json", "features/*.safetensors"),
    "calibration": ("report.json", "units/*.safetensors"),
}  # fmt: skip
"""Glob patterns of the files of each kind of job, beside its manifest and its records."""


def check_own(path: Path, kind: str, overwrite: bool = False) -> None:
    """Raises InputValueError if a folder holds files that are not of a job of this kind.

    Args:
        path: The folder, which need not exist.
        kind: The kind of job.
        overwrite: Whether the folder may hold another job, see `check_replaceable`.
    """
    if (read_object(path / MANIFEST) or {}).get("kind") == kind or next(_visible_files(path), None) is None:
        return
    if not overwrite:
        raise InputValueError(f"{path}: holds files that this command did not write; give a new or empty folder")
    check_replaceable(path)


def check_replaceable(path: Path) -> None:
    """Raises InputValueError unless all files in a folder are those of a job: of any kind, version and condition."""
    patterns = (MANIFEST, RECORDS, *chain(*LAYOUTS.values()))
    written = {file for pattern in patterns for file in path.glob(pattern)} if _has_manifest(path) else set()
    for file in _visible_files(path):
        if file not in written:
            raise InputValueError(f"{file}: not written by a job of jacobiflow; move it, or give another folder")


def _has_manifest(path: Path) -> bool:
    """Tells whether a folder has the manifest of a job, which may be cut short."""
    manifest = read_object(path / MANIFEST)
    if manifest is not None:
        return manifest.get("kind") in LAYOUTS and "spec_sha256" in manifest
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError:
        return False
    beginnings = [json_bytes({"kind": kind}).rstrip(b"\n}") for kind in LAYOUTS]
    return any(content.startswith(begin) or begin.startswith(content) for begin in beginnings)


def _visible_files(path: Path) -> Iterator[Path]:
    """Yields the files in a folder whose path has no hidden part."""
    for file in path.rglob("*"):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not is_hidden and (file.is_symlink() or not file.is_dir()):
            yield file
