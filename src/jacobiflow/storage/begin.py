"""The beginning of a run: what the folder holds, whether the run may go into it, and which shards it lacks.

A run begins in an empty folder, or resumes there what an earlier run with the same settings has left.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from jacobiflow.files import json_bytes, sha256, write_atomically
from jacobiflow.storage.folder import SampleFolder
from jacobiflow.storage.manifest import OTHER_FOLDER, Manifest, SampleFolderError, labels_sha256
from jacobiflow.storage.names import IMAGES, MANIFEST, SHARDS, STRATEGY
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
    path, shards = requested.path, range(requested.manifest.num_shards)
    held = _held(path)
    earlier = None if held is None or overwrite or not has_begun(held) else held.manifest
    _check_names(requested, held, plan is not None)
    if earlier is None:
        strategy = None if plan is None else json_bytes(plan().to_json())
        folder, todo = _with(requested, strategy_sha256=None if strategy is None else sha256(strategy)), list(shards)
    else:
        strategy = None  # it is in the folder
        folder = _resumed(requested, earlier, labels, plan, keep_plan)
        todo = [index for index in shards if _lacks(_with(folder, checksums=earlier.checksums), index, labels)]
        if todo:
            _warn(folder, earlier, todo, here=requested.manifest.machine)
    replaced = held if earlier is None else None
    _check_room(folder, todo, freed=0 if replaced is None else replaced.size())
    _prepare(folder, todo, replaced, strategy)
    return Begun(folder, todo, resumed=earlier is not None)


def _held(path: Path) -> SampleFolder | None:
    """What is in the folder, if anything. **Raises** `SampleFolderError` where that is not ours."""
    if os.path.lexists(path / MANIFEST):
        return SampleFolder.open(path)
    for name in (SHARDS, IMAGES, STRATEGY):
        if os.path.lexists(path / name):
            raise SampleFolderError(f"{path}: has {name} but no {MANIFEST}; give another folder, or move it away")
    return None


def has_begun(held: SampleFolder) -> bool:
    """Whether there is a record. A run that was killed before its first shard has left nothing to resume."""
    return any(file.suffix == ".json" for file in held.named())


def _check_names(requested: SampleFolder, held: SampleFolder | None, has_plan: bool) -> None:
    """**Raises** `SampleFolderError` for what is in the place of a file of the run, but is no file that it wrote."""
    if held is None:
        return
    strategy = held.path / STRATEGY
    ours = {*held.named(), *([] if held.manifest.strategy_sha256 is None else [strategy])}
    names = {*requested.named(), *ours, *([strategy] if has_plan else [])}
    foreign = [path for path in names if os.path.lexists(path) and not (path in ours and path.is_file())]
    if foreign:
        raise SampleFolderError(f"{min(foreign)}: was not written by this run; move it away, or give another folder")


def _lacks(folder: SampleFolder, index: int, labels: Int[Tensor, " n"] | None) -> bool:
    """Whether a shard is to be drawn: it is missing or damaged, or of other labels."""
    record, (start, stop) = folder.record(index), folder.manifest.span(index)
    want = None if labels is None else tuple(labels[start:stop].tolist())
    return record is None or record.labels != want or not folder.verify(index)


def _resumed(
    requested: SampleFolder, earlier: Manifest, labels: Int[Tensor, " n"] | None,
    plan: Callable[[], Strategy] | None, keep_plan: bool,
) -> SampleFolder:  # fmt: skip
    """`requested` with the strategy and the machine of the run that it resumes.

    **Raises** `SampleFolderError` where it would draw other samples than `earlier`.
    """
    path, digest = requested.path, earlier.strategy_sha256
    earlier.check_resumes(requested.manifest, path)
    # The earlier run may have had fewer samples, so fewer labels.
    if labels_sha256(None if labels is None else labels[: earlier.num]) != earlier.labels_sha256:
        raise SampleFolderError(f"{path}: holds samples of other labels; {OTHER_FOLDER}")
    kept = None if digest is None else SampleFolder(path, earlier).planned()
    if not keep_plan:
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
            f"{folder.path}: {len(damaged)} of {folder.manifest.num_shards} shards lack their images or do not match "
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


def _prepare(folder: SampleFolder, todo: Sequence[int], replaced: SampleFolder | None, strategy: bytes | None) -> None:
    """Remove what will be drawn again, and write down what will be drawn."""
    if replaced is not None:
        replaced.empty()
    folder.sweep()
    for index in todo:
        folder.remove(index)
    folder.save_manifest()
    if strategy is not None:
        write_atomically(folder.path / STRATEGY, strategy)
