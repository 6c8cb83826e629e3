"""A job: units of work that depend on its spec only, and a result that is reduced from them."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jacobiflow.errors import InputValueError
from jacobiflow.jobs.store import JobStore, UnitOutput
from jacobiflow.utils import serialization
from jacobiflow.utils.files import FolderInUseError, check_own
from jacobiflow.utils.launch import find_launch
from jacobiflow.utils.progress import Progress

_POLL_SECONDS = 0.2  # Between two looks at the units that other processes are computing.


@dataclass(frozen=True)
class Unit:
    """A unit of work.

    Attributes:
        name: The name, which is part of file names.
        run: Computes the unit from the spec and the units of earlier stages only; may report its progress.
        size: Its share of the progress of the stage.
    """

    name: str
    run: Callable[[Progress | None], UnitOutput]
    size: int = 1


class Job(ABC):
    """Work that any number of processes share through a folder, without talking to each other.

    Attributes:
        kind: The kind of job, such as "samples".
        version: Version of the format of its folder.
        result_name: Name of the file of the result.
        patterns: Glob patterns of the files that the units write; `overwrite` removes all files that match.
        remedy: What to do if the folder has a job of another spec.
        spec: A frozen dataclass of plain values: all that the units depend on. The name of a checksum ends in
            "_sha256".
        machine: The machine, see `jacobiflow.utils.timing.describe_machine`. Another one changes units by rounding.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    result_name: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]] = ()
    remedy: ClassVar[str] = "give another folder, or overwrite this one (--overwrite)"
    spec: Any
    machine: Mapping[str, Any]

    @abstractmethod
    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        """Yields the units of each stage. Those of earlier stages are finished then, and may be read."""

    @abstractmethod
    def reduce(self, store: JobStore) -> Any:
        """Returns the result, a JSON object, from the finished units."""

    def earlier_spec(self, earlier: Mapping[str, Any]) -> Any:
        """Returns the spec that the job in a folder must have, for this one to go on from it.

        Units of the same name must have the same bytes in both.

        Args:
            earlier: The spec of the job in the folder, as a JSON object.
        """
        return self.spec

    @classmethod
    def store(cls, path: str | Path) -> JobStore:
        """Returns the store of a job of this kind in a folder, which need not exist yet."""
        return JobStore(Path(path), cls.kind, cls.version, cls.result_name, cls.patterns)


@dataclass(frozen=True)
class CompletedJob:
    """A complete job, as one of its processes sees it.

    Attributes:
        result: The result, a JSON object.
        was_complete: Whether it was complete before.
        should_print: Whether this process shall print the result. It has reduced the job; or it found the job complete,
            and is the first process of its launcher.
        missing_size: Size of the units of the last stage that were not finished when this process came to it.
        seconds: The time from then until all were finished.
    """

    result: Any
    was_complete: bool
    should_print: bool
    missing_size: int
    seconds: float


def run(job: Job, path: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> CompletedJob:
    """Computes what is left of a job, together with all processes that run it in the same folder.

    A process takes a unit that is neither finished nor locked by another process, and at last waits for the locked
    ones. If a process dies, the system releases its locks, and another process computes its unit. The first process
    that sees all units finished reduces them.

    Args:
        path: The folder.
        overwrite: Whether to replace a complete job, or one of another spec. An incomplete job of this spec is resumed.

    Raises:
        JobFolderError: If the folder holds a job of another spec, or a damaged manifest.
        FolderInUseError: If the job in the folder is to be replaced or extended while another process works on it.
        InputValueError: If the folder holds other files.
    """
    if overwrite and find_launch().count > 1:
        message = "several processes would remove each other's work; remove the folder first"
        raise InputValueError(message, argument="overwrite", value=True)
    store, names = job.store(path), set[str]()
    with ExitStack() as stack:
        with store.lock():
            _start(job, store, overwrite)
            if not store.remove_locks():  # One process reads all files, before the others start.
                store.discard_damaged()
            was_complete = store.read_result() is not None
            stack.enter_context(store.use())
        for units in job.stages(store):
            started = time.perf_counter()
            missing = [unit for unit in units if not store.is_finished(unit.name)]
            for unit, part in _claim(store, units, missing, progress):
                store.write(unit.name, unit.run(part))
            names |= {unit.name for unit in units}
        seconds = time.perf_counter() - started
        with store.lock():
            stack.close()
            store.remove_locks()
            is_reducer = store.read_result() is None
            if is_reducer:
                store.write_result(job.reduce(store), names)
            should_print = is_reducer or (was_complete and find_launch().rank == 0)
            missing_size = sum(unit.size for unit in missing)
            return CompletedJob(store.read_result(), was_complete, should_print, missing_size, seconds)


def _start(job: Job, store: JobStore, overwrite: bool) -> None:
    """Writes the manifest of a new, larger or overwritten job; checks that of another one."""
    check_own(store.path, job.kind)
    spec, machine, earlier = serialization.encode(job.spec), job.machine, store.read_spec()
    is_complete = store.read_result() is not None
    is_replaced = overwrite and earlier is not None and (is_complete or earlier != spec)
    if earlier is not None and not is_replaced:
        store.check_spec(serialization.encode(job.earlier_spec(earlier)), job.remedy)
        machine = store.machine()
        if (not is_complete or earlier != spec) and machine != job.machine:
            warnings.warn(
                f"{store.path}: begun on another machine or by other versions: equal to rounding, not to the bit",
                stacklevel=3,
            )
    if is_replaced or earlier != spec:
        if store.remove_locks():
            raise FolderInUseError(
                f"{store.path}: another run is writing to it; wait for it, stop it, or give another folder"
            )
        if is_replaced:
            store.clear()
        store.discard_result()
        store.write_manifest(spec, machine)


def _claim(
    store: JobStore, units: Sequence[Unit], missing: Sequence[Unit], progress: Progress | None
) -> Iterator[tuple[Unit, Progress | None]]:
    """Yields the missing units of a stage that no other process computes, each locked until the next one.

    With each comes its `Progress`, which counts as that of the stage. At last it waits for the locked units.
    """
    todo, total = [*missing], sum(unit.size for unit in units)
    done = total - sum(unit.size for unit in todo)
    if done and progress is not None:
        progress(done, total, store.kind)
    while todo:
        for unit in todo.copy():
            with ExitStack() as stack:
                try:
                    stack.enter_context(store.claim(unit.name))
                except FolderInUseError:
                    continue
                if not store.is_finished(unit.name):  # Another process may have finished it meanwhile.
                    yield unit, progress and partial(_report_part, progress, store.kind, done, unit.size, total)
            todo.remove(unit)
            done += unit.size
            if progress is not None:
                progress(done, total, store.kind)
        if todo:
            time.sleep(_POLL_SECONDS)


def _report_part(
    progress: Progress, kind: str, done_before: int, size: int, stage_total: int, done: int, total: int, what: str
) -> None:
    """Reports the progress of a unit as a part of that of its stage."""
    progress(done_before + size * done // total, stage_total, kind)
