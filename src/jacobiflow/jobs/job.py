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
from jacobiflow.jobs.store import JobFolderError, JobStore, UnitOutput
from jacobiflow.utils import serialization
from jacobiflow.utils.files import FolderInUseError
from jacobiflow.utils.launch import find_launch
from jacobiflow.utils.layout import LAYOUTS, check_own, check_replaceable
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
        kind: The kind of job, such as "samples", whose files `jacobiflow.utils.layout.LAYOUTS` lists.
        version: Version of the format of its folder.
        oldest: The oldest version whose folders can be read.
        result_name: Name of the file of the result.
        remedy: What to do if the folder has a job of another spec.
        spec: A frozen dataclass of plain values: all that the units depend on. The name of a checksum ends in
            "_sha256".
        machine: The machine, see `jacobiflow.utils.timing.describe_machine`. Another one changes units by rounding.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    oldest: ClassVar[int] = 1
    result_name: ClassVar[str]
    remedy: ClassVar[str] = "give another folder, or overwrite this one (--overwrite)"
    spec: Any
    machine: Mapping[str, Any]

    @abstractmethod
    def stages(self, store: JobStore) -> Iterator[list[Unit]]:
        """Yields the units of each stage. Those of earlier stages are finished then, and may be read."""

    @abstractmethod
    def reduce(self, store: JobStore) -> Any:
        """Returns the result, a JSON object, from the finished units."""

    def resume(self, earlier: Mapping[str, Any]) -> Job:
        """Returns this job with the choices of the job in a folder, for those that the caller has left open.

        Args:
            earlier: The spec of the job in the folder, as a JSON object.
        """
        return self

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
        return JobStore(Path(path), cls.kind, cls.version, cls.result_name, cls.oldest)


@dataclass(frozen=True)
class CompletedJob:
    """A complete job, as one of its processes sees it.

    Attributes:
        job: The job, with the choices of an earlier one that it has gone on from, see `Job.resume`.
        result: The result, a JSON object.
        was_complete: Whether it was complete before.
        should_print: Whether this process shall print the result. It has reduced the job; or it found the job complete,
            and is the first process of its launcher.
        missing_size: Size of the units of the last stage that were not finished when this process came to it.
        seconds: The time from then until all were finished.
    """

    job: Any
    result: Any
    was_complete: bool
    should_print: bool
    missing_size: int
    seconds: float


def run(job: Job, path: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> CompletedJob:
    """Computes what is left of a job, together with all processes that run it in the same folder.

    A process begins at a place of its own in the list of units. It takes a unit that no process has taken, computes it
    or checks the files that are there, and at last waits for the units of others. If a process dies, the system
    releases its locks, and another process takes its unit. The first process that sees all units finished reduces them.

    Args:
        path: The folder.
        overwrite: Whether to replace a complete job, or another one: of another spec, kind or version, or with a
            damaged manifest. An incomplete job of this spec is resumed.

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
            job = _start(job, store, overwrite)
            was_complete, place = store.read_result() is not None, store.count_users()
            stack.enter_context(store.use())
        for units in job.stages(store):
            started = time.perf_counter()
            missing = {unit.name for unit in units if not store.has_record(unit.name)}
            for unit, part in _claim(store, units, place, progress):
                if not store.discard_unless_intact(unit.name):
                    missing.add(unit.name)
                    store.write(unit.name, unit.run(part))
            names |= {unit.name for unit in units}
        seconds = time.perf_counter() - started
        with store.lock():
            stack.close()
            store.count_users()
            is_reducer = store.read_result() is None
            if is_reducer:
                store.write_result(job.reduce(store), names)
            was_complete &= not is_reducer  # A damaged unit was computed again.
            should_print = is_reducer or (was_complete and find_launch().rank == 0)
            missing_size = sum(unit.size for unit in units if unit.name in missing)
            return CompletedJob(job, store.read_result(), was_complete, should_print, missing_size, seconds)


def _start(job: Job, store: JobStore, overwrite: bool) -> Job:
    """Writes the manifest of a new, larger or overwritten job; checks that of another one, and goes on from it."""
    is_complete = store.read_result() is not None
    earlier = _read_spec(job, store, overwrite)
    if earlier is None:
        is_replaced = overwrite
    else:
        resumed = job.resume(earlier)
        is_replaced = overwrite and (is_complete or earlier != serialization.encode(resumed.spec))
        job = job if is_replaced else resumed
    spec, machine = serialization.encode(job.spec), job.machine
    if earlier is not None and not is_replaced:
        store.check_spec(serialization.encode(job.earlier_spec(earlier)), job.remedy)
        machine = store.machine()
        if (not is_complete or earlier != spec) and machine != job.machine:
            warnings.warn(
                f"{store.path}: begun on another machine or by other versions: equal to rounding, not to the bit",
                stacklevel=3,
            )
    if is_replaced or earlier != spec:
        if store.count_users():
            raise FolderInUseError(
                f"{store.path}: another run is writing to it; wait for it, stop it, or give another folder"
            )
        if is_replaced:
            store.clear(LAYOUTS if earlier is None else [job.kind])
        store.discard_result()
        store.write_manifest(spec, machine)
    return job


def _read_spec(job: Job, store: JobStore, overwrite: bool) -> dict[str, Any] | None:
    """Returns the spec of a job of this kind in the folder; None if there is none, or one to be replaced unread."""
    try:
        check_own(store.path, job.kind, overwrite)
        earlier = store.read_spec()
        if earlier is not None:
            store.check_version()
        return earlier
    except JobFolderError:  # Damaged, or of another version.
        if not overwrite:
            raise
        check_replaceable(store.path)
        return None


def _claim(
    store: JobStore, units: Sequence[Unit], place: int, progress: Progress | None
) -> Iterator[tuple[Unit, Progress | None]]:
    """Yields the units of a stage that no other process has settled or claimed, each locked until the next one.

    With each comes its `Progress`, which counts as that of the stage. At last it waits for the claimed ones.

    Args:
        place: The number of processes that came before this one, by which it begins at a place of its own.
    """
    start, total, done = int(_fraction(place) * len(units)), sum(unit.size for unit in units), 0
    todo, is_first_look = [*units[start:], *units[:start]], True
    while todo:
        claimed = list[Unit]()
        for unit in todo:
            if not store.is_settled(unit.name):
                if is_first_look and store.is_claimed(unit.name):
                    claimed.append(unit)
                    continue
                with ExitStack() as stack:
                    try:
                        stack.enter_context(store.claim(unit.name))
                    except FolderInUseError:
                        claimed.append(unit)
                        continue
                    if not store.is_settled(unit.name):  # Another process may have settled it meanwhile.
                        yield unit, progress and partial(_report_part, progress, store.kind, done, unit.size, total)
                        store.settle(unit.name)
            done += unit.size
            if progress is not None:
                progress(done, total, store.kind)
        if claimed and not is_first_look:
            time.sleep(_POLL_SECONDS)
        todo, is_first_look = claimed, False


def _fraction(place: int) -> float:
    """Returns 0, 1/2, 1/4, 3/4, 1/8, ...: the digits of a place in the binary system, mirrored at the point."""
    return int(f"{place:b}"[::-1], 2) / 2 ** place.bit_length()


def _report_part(
    progress: Progress, kind: str, done_before: int, size: int, stage_total: int, done: int, total: int, what: str
) -> None:
    """Reports the progress of a unit as a part of that of its stage."""
    progress(done_before + size * done // total, stage_total, kind)
