"""A job: units of work that depend on its spec only, and a result that is reduced from them."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jacobiflow.errors import InputValueError
from jacobiflow.jobs.folder import JobFolder, UnitOutput
from jacobiflow.utils import serialization
from jacobiflow.utils.files import FolderInUseError
from jacobiflow.utils.launch import find_launch
from jacobiflow.utils.progress import Progress

_POLL_SECONDS = 0.2  # Between two looks at the units that other processes are computing.


class Job(ABC):
    """Work that any number of processes share through a folder, without talking to each other.

    The bytes of a unit depend on its name, the spec and the units of earlier stages only, so it does not matter which
    process computes it, nor how often. The name is part of file names.

    Attributes:
        kind: The kind of job, such as "samples".
        version: Version of the format of its folder.
        result_name: Name of the file of the result.
        patterns: Glob patterns of the files that the units write; `overwrite` removes all files that match.
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
        """Yields the units of each stage, with their sizes for the progress. A stage may read units of earlier ones."""

    @abstractmethod
    def compute(self, unit: str, folder: JobFolder, progress: Progress | None) -> UnitOutput:
        """Computes a unit."""

    @abstractmethod
    def reduce(self, folder: JobFolder) -> Any:
        """Returns the result, a JSON object, from the finished units."""

    def earlier_spec(self, earlier: Mapping[str, Any]) -> Any:
        """Returns the spec that the job in a folder must have, for this one to go on from it.

        Units of the same name must have the same bytes in both.

        Args:
            earlier: The spec of the job in the folder, as a JSON object.
        """
        return self.spec

    @classmethod
    def folder(cls, path: str | Path) -> JobFolder:
        """Returns the folder of a job of this kind, which need not exist yet."""
        return JobFolder(Path(path), cls.kind, cls.version, cls.result_name, cls.patterns)


@dataclass(frozen=True)
class JobRun:
    """The outcome of `run`.

    Attributes:
        result: The result, a JSON object.
        is_reporter: Whether this process shall print the result. It has reduced the job; or it found the job complete,
            and is the first process of its launcher.
        missing: The units of the last stage that were not finished when this process came to it.
        seconds: The time from then until all were finished.
    """

    result: Any
    is_reporter: bool
    missing: tuple[str, ...]
    seconds: float


def run(job: Job, path: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> JobRun:
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
    folder, missing, started = job.folder(path), tuple[str, ...](), time.perf_counter()
    with ExitStack() as stack:
        with folder.lock():
            _start(job, folder, overwrite)
            result = folder.read_result()
            if result is not None and all(folder.is_intact(unit) for units in job.stages(folder) for unit in units):
                return JobRun(result, find_launch().rank == 0, missing, 0.0)
            folder.discard_result()
            is_alone = not folder.is_in_use()  # Else another process has checked the finished units.
            stack.enter_context(folder.use())
        for units in job.stages(folder):
            started = time.perf_counter()
            for unit in units if is_alone else ():
                folder.discard_damaged(unit)
            missing = tuple(unit for unit in units if not folder.is_finished(unit))
            for unit, note in _claim(folder, units, progress):
                folder.write(unit, job.compute(unit, folder, note))
        seconds = time.perf_counter() - started
        with folder.lock():
            stack.close()
            folder.remove_locks()
            is_reducer = folder.read_result() is None
            if is_reducer:
                folder.write_result(job.reduce(folder))
            return JobRun(folder.read_result(), is_reducer, missing, seconds)


def _start(job: Job, folder: JobFolder, overwrite: bool) -> None:
    """Writes the manifest of a new, larger or overwritten job; checks that of another one."""
    spec, machine, earlier = serialization.encode(job.spec), job.machine, folder.read_spec()
    is_complete = folder.read_result() is not None
    is_replaced = overwrite and earlier is not None and (is_complete or earlier != spec)
    if earlier is not None and not is_replaced:
        folder.check_spec(serialization.encode(job.earlier_spec(earlier)))
        machine = folder.machine()
        if not is_complete and machine != job.machine:
            warnings.warn(
                f"{folder.path}: begun on another machine or by other versions: equal to rounding, not to the bit",
                stacklevel=3,
            )
    if is_replaced or earlier != spec:
        if folder.is_in_use():
            raise FolderInUseError(
                f"{folder.path}: another run is writing to it; wait for it, stop it, or give another folder"
            )
        if is_replaced:
            folder.clear()
        folder.discard_result()
        folder.write_manifest(spec, machine)


def _claim(
    folder: JobFolder, units: Mapping[str, int], progress: Progress | None
) -> Iterator[tuple[str, Progress | None]]:
    """Yields the units that this process computes, each locked until the next one, until all units are finished.

    With each unit comes its `Progress`, which counts as that of all units.
    """
    todo, total = dict(units), sum(units.values())
    num_left = total
    while todo:
        has_waited = True
        for unit, size in list(todo.items()):
            with folder.claim(unit) as is_mine:
                if is_mine:
                    yield unit, progress and _PartOfProgress(progress, folder.kind, total - num_left, size, total)
                    has_waited = False
            if folder.is_finished(unit):
                num_left -= todo.pop(unit)
                if progress is not None:
                    progress(total - num_left, total, folder.kind)
        if todo and has_waited:
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class _PartOfProgress:
    """The progress of a unit as a part of that of its stage."""

    progress: Progress
    kind: str
    num_before: int
    size: int
    total: int

    def __call__(self, done: int, total: int, what: str) -> None:
        self.progress(self.num_before + self.size * done // total, self.total, self.kind)
