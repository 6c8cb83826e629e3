"""The beginning of a run: what the folder holds, whether the run may go into it, and which shards it lacks.

A run begins in an empty folder, or resumes there what an earlier run with the same settings has left.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from jacobiflow.files import json_bytes, sha256, write_atomically
from jacobiflow.storage.folder import IMAGES, MANIFEST, SHARDS, STRATEGY, SampleFolder
from jacobiflow.storage.manifest import OTHER_FOLDER, Manifest, SampleFolderError, labels_sha256
from jacobiflow.strategy import Strategy


@dataclass(frozen=True)
class Begun:
    """The folder of a run, and the shards it lacks; `resumed` where an earlier run began them."""

    folder: SampleFolder
    todo: list[int]
    resumed: bool


def begin(
    requested: SampleFolder,
    labels: Int[Tensor, " n"] | None,
    plan: Callable[[], Strategy] | None = None,
    keep_plan: bool = False,
    overwrite: bool = False,
) -> Begun:
    """Make a folder ready for the run that `requested` describes; see `jacobiflow.storage.run.generate`.

    **Raises** `SampleFolderError` where the folder holds other samples or its disk is too small, before any change.
    """
    path, shards = requested.path, range(len(requested.manifest.spans()))
    earlier = _earlier(path, overwrite)
    if earlier is None:
        strategy = None if plan is None else json_bytes(plan().to_json())
        folder, todo = _with(requested, strategy_sha256=None if strategy is None else sha256(strategy)), list(shards)
    else:
        strategy = None  # it is in the folder
        folder = _resumed(requested, earlier, labels, plan, keep_plan)
        todo = [index for index in shards if not folder.verify(index)]
        if todo:
            _warn(folder, earlier, todo, here=requested.manifest.machine)
    _check_room(folder, todo, freed=folder.size() if earlier is None else 0)
    _prepare(folder, todo, overwrite, strategy)
    return Begun(folder, todo, resumed=earlier is not None)


def _earlier(path: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the run to resume, if any. **Raises** `SampleFolderError` for shards without a manifest."""
    if not (path / MANIFEST).exists():
        for name in (SHARDS, IMAGES, STRATEGY):
            if (path / name).exists():
                raise SampleFolderError(f"{path}: has {name} but no {MANIFEST}; give another folder, or remove it")
        return None
    # A run that was killed before its first shard has left nothing to resume.
    if overwrite or not any((path / SHARDS).glob("*.json")):
        return None
    return SampleFolder.open(path).manifest


def _resumed(
    requested: SampleFolder, earlier: Manifest, labels: Int[Tensor, " n"] | None,
    plan: Callable[[], Strategy] | None, keep_plan: bool,
) -> SampleFolder:  # fmt: skip
    """`requested` with the strategy and the machine of the run that it resumes.

    **Raises** `SampleFolderError` where it would draw other samples than `earlier`.
    """
    path, file, digest = requested.path, requested.path / STRATEGY, earlier.strategy_sha256
    earlier.check_resumes(requested.manifest, path)
    # The earlier run may have had fewer samples, so fewer labels.
    if labels_sha256(None if labels is None else labels[: earlier.num]) != earlier.labels_sha256:
        raise SampleFolderError(f"{path}: holds samples of other labels; {OTHER_FOLDER}")
    if digest is not None and not (file.is_file() and sha256(file.read_bytes()) == digest):
        raise SampleFolderError(f"{file}: has changed since its run wrote it; restore it, or give overwrite=True")
    if not keep_plan:
        kept = None if digest is None else Strategy.load(file)
        planned = None if plan is None else Strategy.from_json(plan().to_json())
        if kept != planned:
            raise SampleFolderError(f"{path}: holds samples of another strategy of this name; {OTHER_FOLDER}")
    return _with(requested, strategy_sha256=digest, machine=earlier.machine)


def _with(folder: SampleFolder, **entries: Any) -> SampleFolder:
    """The folder with other entries in its manifest."""
    return replace(folder, manifest=replace(folder.manifest, **entries))


def _warn(folder: SampleFolder, earlier: Manifest, todo: Sequence[int], here: dict[str, Any]) -> None:
    """Say which shards are damaged, and that the rest is drawn on another machine."""
    # The last shard of a run that grows is expected to be drawn again, unless it is full.
    grows = earlier.num < folder.manifest.num
    partial = earlier.num // earlier.shard_size if grows else None
    damaged = [index for index in todo if folder.has(index) and index != partial]
    if damaged:
        warnings.warn(
            f"{folder.path}: {len(damaged)} of {len(folder.manifest.spans())} shards lack their images or do not match "
            f"their checksums, {damaged[0]:05} for one; drawn again",
            stacklevel=2,
        )
    began, resumes = (f"{m.get('device')} with {m.get('threads')} threads" for m in (earlier.machine, here))
    if began != resumes:
        warnings.warn(
            f"{folder.path}: begun on {began}, resumed on {resumes}: equal to rounding, not to the bit", stacklevel=2
        )


def _check_room(folder: SampleFolder, todo: Sequence[int], freed: int) -> None:
    """**Raises** `SampleFolderError` where the missing shards would not fit on the disk."""
    channels, height, width = folder.manifest.image_shape
    need = folder.manifest.num_in(todo) * channels * height * width
    free = shutil.disk_usage(folder.path).free + freed
    if need > free:
        raise SampleFolderError(
            f"{folder.path}: the samples to draw take {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, "
            "or give another folder"
        )


def _prepare(folder: SampleFolder, todo: Sequence[int], overwrite: bool, strategy: bytes | None) -> None:
    """Remove what will be drawn again, and write down what will be drawn."""
    if overwrite and (folder.path / MANIFEST).exists():
        folder.clear()
    folder.sweep()
    for index in todo:
        folder.remove(index)
    folder.save_manifest()
    if strategy is not None:
        write_atomically(folder.path / STRATEGY, strategy)
