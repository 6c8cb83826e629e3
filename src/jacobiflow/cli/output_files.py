"""Checks of the files that a command writes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from jacobiflow.errors import InputValueError

# Names of files that commands read from a model's folder or write to an output folder.
_RESERVED_NAMES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "README.md",
    "report.json", "report-*.json", "tuning.json", "tuning-*.json", "checkpoint.pt", "metrics.jsonl", "samples*.png",
    "manifest.json", "strategy.json", "shards", "images", "evaluation.json", "bench.*",
)  # fmt: skip


def check_output(
    option: str, path: Path | None, model: str | None, *inputs: str | Path | None,
    outputs: Iterable[Path | None] = (), replaces: str = "",
) -> None:  # fmt: skip
    """Raises ValueError if an output file cannot be written, or would replace another file of the command.

    Args:
        option: The option that gives the file, for the message.
        path: The file.
        model: The model of the command. Only its files that match the pattern `replaces` may be replaced.
        inputs: Files and folders that the command reads. `FILE.py:FUNCTION` stands for the file.
        outputs: Other files and folders that the command writes.
    """
    from jacobiflow.models.checkpoints.folder import list_bundled

    if path is None:
        return
    target = path.resolve()
    if target.is_dir():
        raise InputValueError(f"{option} {path}: is a folder; give a file")
    for source in map(str, filter(None, inputs)):
        file = list_bundled().get(source, Path(re.sub(r"(?<=\.py):\w+$", "", source)))
        if os.path.exists(file) and target.is_relative_to(file.resolve()):
            raise InputValueError(f"{option} {path}: is in {source}, which this command reads; give another file")
    model_folders = [] if model is None else [list_bundled().get(model, Path(model))]
    for other in (each.resolve() for each in (*model_folders, *outputs) if each is not None):
        first_parts = target.relative_to(other).parts[:1] if target.is_relative_to(other) else ()
        is_reserved = any(fnmatch(part, name) for part in first_parts for name in _RESERVED_NAMES)
        if other.is_relative_to(target) or (is_reserved and not fnmatch(target.name, replaces)):
            raise InputValueError(f"{option} {path}: this command reads or writes that file itself; give another file")
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputValueError(f"{option} {path}: cannot be written; give a file in another folder")


def tuning_files_beside(out: Path) -> tuple[Path, Path]:
    """Returns the two files, without and with guidance, that `plan --tune` may write for a bundled model."""
    return out.with_name("tuning.json"), out.with_name("tuning-guided.json")
