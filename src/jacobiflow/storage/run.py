"""A run: the shards that a folder lacks, each process drawing its share."""

from __future__ import annotations

import errno
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from jaxtyping import Int
from torch import Tensor

from jacobiflow.files import json_bytes, sha256, write_atomically
from jacobiflow.latents import draw_latents
from jacobiflow.locking import MANIFEST, check_own, locked
from jacobiflow.progress import Progress
from jacobiflow.sampling import Samples
from jacobiflow.storage.folder import STRATEGY, SampleFolder
from jacobiflow.storage.manifest import OTHER_FOLDER, SampleFolderError, labels_sha256
from jacobiflow.storage.processes import Processes
from jacobiflow.strategy import Strategy

_POLL = 0.2  # seconds

Draw = Callable[[Tensor, Tensor | None, Strategy, Progress | None], Samples]
"""Draws a shard: of its latents, its labels, and the strategy."""

OnShard = Callable[[int, Samples], None]
"""A function that is called after a shard was drawn, with the index of its first sample, and the samples."""


@dataclass(frozen=True)
class Run:
    """A run of `sample_to_folder`.

    Attributes:
        folder: The folder, with the manifest of the samples to draw.
        latent_shape: (T, C).
        plan: Makes the strategy.
        keep_plan: Resume with the strategy in the folder instead of a comparison: plans by timings differ.
    """

    folder: SampleFolder
    labels: Int[Tensor, " n"] | None
    latent_shape: tuple[int, int]
    draw: Draw
    plan: Callable[[], Strategy]
    keep_plan: bool
    overwrite: bool
    processes: Processes
    on_shard: OnShard | None
    progress: Progress | None

    def complete(self) -> SampleFolder:
        """Draws the shards that the folder lacks. The first process waits until the others have drawn theirs."""
        rank, count = self.processes.rank, self.processes.count
        with ExitStack() as stack:

            def start() -> tuple[SampleFolder, list[int]]:
                self._earlier()  # refuses a folder of others before there is a lock in it
                stack.enter_context(locked(self.folder.path))
                return self._begin()

            folder, todo = self.processes.on_first(start)
            if not (folder.path / MANIFEST).exists():
                raise SampleFolderError(f"{folder.path}: process {rank} does not see it; give one on a shared disk")
            strategy = folder.strategy()
            present = folder.manifest.num - folder.manifest.num_in(todo)
            for index in todo[rank::count]:
                self._draw_shard(folder, index, strategy, present)
                present += count * folder.manifest.num_in([index])
            if rank == 0:
                _wait(folder, todo)
                checksums = tuple(record.sha256 for record in folder.records())
                folder = _with(folder, checksums=checksums)
                folder.save_manifest()
        return replace(folder, drawn=folder.manifest.num_in(todo))

    def _earlier(self) -> SampleFolder | None:
        """Returns the samples in the folder. Raises ValueError if it has other files."""
        path = self.folder.path
        if (path / MANIFEST).exists():
            return SampleFolder.open(path)
        check_own(path, self.folder.manifest.kind)
        return None

    def _begin(self) -> tuple[SampleFolder, list[int]]:
        """Makes the folder ready; returns it with the shards to draw.

        Raises SampleFolderError if it holds other samples or its disk is too small, before any change.
        """
        path, earlier = self.folder.path, self._earlier()
        if earlier is not None and any(map(earlier.has, range(earlier.manifest.num_shards))) and not self.overwrite:
            return self._resume(earlier)
        strategy = json_bytes(self.plan().to_json())
        folder = _with(self.folder, strategy_sha256=sha256(strategy))
        todo = list(range(folder.manifest.num_shards))
        if earlier is None:
            _check_room(folder, todo)
        else:
            earlier.clear()
        folder.remove_partials()
        folder.save_manifest()
        write_atomically(path / STRATEGY, strategy)
        return folder, todo

    def _resume(self, earlier: SampleFolder) -> tuple[SampleFolder, list[int]]:
        path, manifest = self.folder.path, earlier.manifest
        manifest.check_resumes(self.folder.manifest, path)
        # The earlier run may have had fewer samples, so fewer labels.
        if labels_sha256(None if self.labels is None else self.labels[: manifest.num]) != manifest.labels_sha256:
            raise SampleFolderError(f"{path}: holds samples of other labels; {OTHER_FOLDER}")
        planned = earlier.strategy()
        if not self.keep_plan and planned != Strategy.from_json(self.plan().to_json()):
            raise SampleFolderError(f"{path}: holds samples of another strategy of this name; {OTHER_FOLDER}")
        same = {name: getattr(manifest, name) for name in ("strategy_sha256", "machine", "checksums")}
        folder = _with(self.folder, **same)
        todo = [index for index in range(folder.manifest.num_shards) if not folder.verify(index)]
        if todo:
            damaged = [index for index in todo if folder.record(index) is not None]
            _warn(folder, damaged, machine=self.folder.manifest.machine)
            _check_room(folder, todo)
            folder = _with(folder, checksums=None)
            folder.save_manifest()
        folder.remove_partials()
        for index in todo:
            folder.remove_record(index)
        return folder, todo

    def _draw_shard(self, folder: SampleFolder, index: int, strategy: Strategy, present: int) -> None:
        start, stop = folder.manifest.span(index)
        latents = draw_latents(stop - start, *self.latent_shape, folder.manifest.seed, start)
        labels = None if self.labels is None else self.labels[start:stop]

        def note(done: int, total: int, what: str) -> None:
            """Counts the samples of this shard that are solved, and as many of each other process."""
            if self.progress is not None:
                num = present + (stop - start) * done * self.processes.count // total
                self.progress(min(num, folder.manifest.num), folder.manifest.num, "samples")

        samples = self.draw(latents, labels, strategy, note)
        try:
            folder.write(index, samples)
        except OSError as error:
            remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "correct this"
            raise OSError(
                f"{error.filename or folder.path}: {error.strerror}; the finished shards stay: {remedy}, then sample "
                "into the folder again with the same settings"
            ) from error
        if self.on_shard is not None:
            self.on_shard(start, samples)


def _with(folder: SampleFolder, **entries: Any) -> SampleFolder:
    """Returns the folder with other entries in its manifest."""
    return replace(folder, manifest=replace(folder.manifest, **entries))


def _warn(folder: SampleFolder, damaged: Sequence[int], machine: dict[str, Any]) -> None:
    """Warns of damaged shards, and of another machine."""
    if damaged:
        warnings.warn(
            f"{folder.path}: {len(damaged)} of {folder.manifest.num_shards} shards do not match their checksums, "
            f"{damaged[0]:05} for one; drawn again",
            stacklevel=2,
        )
    began, resumes = (f"{m.get('device')} with {m.get('threads')} threads" for m in (folder.manifest.machine, machine))
    if began != resumes:
        warnings.warn(
            f"{folder.path}: begun on {began}, resumed on {resumes}: equal to rounding, not to the bit", stacklevel=2
        )


def _check_room(folder: SampleFolder, todo: Sequence[int]) -> None:
    """Raises SampleFolderError if the missing shards do not fit on the disk."""
    need = folder.manifest.num_in(todo) * prod(folder.manifest.image_shape)
    free = shutil.disk_usage(folder.path).free
    if need > free:
        raise SampleFolderError(
            f"{folder.path}: the samples to draw take {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, "
            "or give another folder"
        )


def _wait(folder: SampleFolder, todo: Sequence[int]) -> None:
    """Waits for the shards of the other processes; torchrun stops this one if one of them fails."""
    for index in todo:
        while not folder.has(index):
            time.sleep(_POLL)
