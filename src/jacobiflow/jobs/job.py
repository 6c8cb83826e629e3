"""A job: units of work that depend on its spec only, and a result that is reduced from them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jacobiflow.errors import InputValueError
from jacobiflow.jobs.folder import JobFolder, UnitOutput
from jacobiflow.jobs.launch import find_launch
from jacobiflow.utils import serialization
from jacobiflow.utils.progress import Progress

_POLL_SECONDS = 0.2  # Between two looks at the units that other processes are computing.


class Job(ABC):
    """Work that any number of processes share through a folder, without talking to each other.

    The bytes of a unit depend on the spec and on the units of earlier stages only, so it does not matter which process
    computes it, nor how often.

    Attributes:
        kind: The kind of job, such as "samples".
        version: Version of the format of its folder.
        result_name: Name of the file of the result.
        patterns: Glob patterns of the files that the units write.
        spec: A frozen dataclass of plain values: all that the units depend on. The name of a checksum ends in
            "_sha256".
        machine: The machine, see `jacobiflow.utils.timing.describe_machine`. Another one changes units by rounding.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    result_name: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]] = ()
    spec: Any
    machine: Mapping[str, Any]

    @abstractmethod
    def stages(self, folder: JobFolder) -> Iterator[Mapping[str, int]]:
        """Yields the units of each stage, and the size of each for the progress. A stage may read earlier ones."""

    @abstractmethod
    def compute(self, unit: str, folder: JobFolder, progress: Progress | None) -> UnitOutput:
        """Computes a unit."""

    @abstractmethod
    def reduce(self, folder: JobFolder) -> Any:
        """Returns the result, a JSON value, from the finished units."""

    def earlier_spec(self, earlier: Mapping[str, Any]) -> Any:
        """Returns the spec that the job in a folder must have, for this one to go on from it."""
        return self.spec

    @classmethod
    def folder(cls, path: str | Path) -> JobFolder:
        """Returns the folder of a job of this kind, which need not exist yet."""
        return JobFolder(Path(path), cls.kind, cls.version, cls.result_name)


@dataclass(frozen=True)
class JobRun:
    """What became of a job.

    Attributes:
        result: The result, a JSON value.
        is_reducer: Whether this process made the result.
        missing: The units of the last stage that were missing when this process came to them.
        seconds: The time from then until they were finished.
    """

    result: Any
    is_reducer: bool
    missing: tuple[str, ...]
    seconds: float


def run(job: Job, path: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> JobRun:
    """Computes what is left of a job, together with all processes that run it in the same folder.

    A process takes a unit that is neither finished nor locked by another process, and at last waits for the locked
    ones. If a process dies, the system releases its locks, and another process computes its unit. One process reduces
    the finished units.

    Args:
        path: The folder.
        overwrite: Whether to replace a complete job, or one of another spec. An incomplete job of this spec goes on.

    Raises:
        JobFolderError: If the folder holds a job of another spec, or other files.
    """
    if overwrite and find_launch().count > 1:
        message = "several processes would remove each other's work; remove the folder first"
        raise InputValueError(message, argument="overwrite", value=True)
    folder, missing, started = job.folder(path), tuple[str, ...](), time.perf_counter()
    with folder.lock():
        earlier = folder.read_spec()
        if overwrite and (folder.read_result() is not None or earlier != serialization.encode(job.spec)):
            folder.clear(job.patterns)
            earlier = None
        folder.start(job.spec, job.spec if earlier is None else job.earlier_spec(earlier), job.machine)
        if folder.read_result() is not None and not _discard_damaged(job, folder):
            return JobRun(folder.read_result(), False, missing, 0.0)
    while True:
        for units in job.stages(folder):
            started = time.perf_counter()
            missing = tuple(unit for unit in units if not folder.is_finished(unit))
            for unit, note in _claim(folder, units, None if progress is None else partial(progress, what=job.kind)):
                folder.write(unit, job.compute(unit, folder, note))
        seconds = time.perf_counter() - started
        with folder.lock():
            folder.start(job.spec, job.spec, job.machine)  # An error if another process has begun a larger job here.
            is_reducer = folder.read_result() is None
            if not is_reducer or not _discard_damaged(job, folder):
                if is_reducer:
                    folder.write_result(job.reduce(folder))
                return JobRun(folder.read_result(), is_reducer, missing, seconds)


def _discard_damaged(job: Job, folder: JobFolder) -> bool:
    """Removes the records of damaged units of the first stage that has any; tells if there were any."""
    return any(folder.discard_damaged(list(units)) for units in job.stages(folder))


def _claim(
    folder: JobFolder, units: Mapping[str, int], progress: Callable[[int, int], object] | None
) -> Iterator[tuple[str, Progress | None]]:
    """Yields the units that this process computes, each locked until the next one, until all units are finished.

    With each comes a `Progress` of the unit, which counts as that of all units.
    """
    todo, total = dict(units), sum(units.values())
    num_left = total
    while todo:
        has_waited = True
        for unit, size in list(todo.items()):
            with folder.claim(unit) as is_mine:
                if is_mine:
                    yield unit, progress and partial(_add_progress, progress, total - num_left, size, total)
                    has_waited = False
            if folder.is_finished(unit):
                num_left -= todo.pop(unit)
                if progress is not None:
                    progress(total - num_left, total)
        if todo and has_waited:
            time.sleep(_POLL_SECONDS)


def _add_progress(
    progress: Callable[[int, int], object], num_done: int, size: int, total: int, done: int, out_of: int, what: str
) -> None:
    """Reports the progress of a unit, which is `done / out_of`, as that of its stage."""
    progress(num_done + size * done // out_of, total)
