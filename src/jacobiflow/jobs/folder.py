"""The folder of a job.

manifest.json    the kind of job, its spec and the checksum of the spec, and the machine on which it began
units/NAME.json  the record of a finished unit: the checksums of its files, and its value
...              the files of the units, under the names that the job gives them
RESULT           the result, under the name that the job gives it
.lock, .lock-*   locks, which the system releases when a process ends or dies
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jacobiflow.errors import InputValueError
from jacobiflow.utils import files, serialization
from jacobiflow.utils.checks import format_value
from jacobiflow.utils.files import LOCK, MANIFEST, FolderInUseError, locked


class JobFolderError(InputValueError):
    """A folder cannot be used for a job; the message names the file and the remedy."""


@dataclass(frozen=True)
class UnitOutput:
    """The output of a unit.

    Attributes:
        files: The content of each file, by its name in the folder.
        value: A JSON value.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    value: Any = None


@dataclass(frozen=True)
class JobFolder:
    """The manifest, the finished units and the result of a job of one kind.

    Attributes:
        path: The folder.
        kind: The kind of job, such as "samples".
        version: Version of the format of this kind.
        result_name: Name of the file of the result.
    """

    path: Path
    kind: str
    version: int
    result_name: str

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Waits until no other process starts or reduces the job, and keeps them from it until the block ends."""
        with locked(self.path, wait=float("inf")):
            yield

    @contextmanager
    def claim(self, unit: str) -> Iterator[bool]:
        """Locks a unit until the block ends; yields False if it is finished, or if another process has locked it."""
        if self.is_finished(unit):
            yield False
            return
        try:
            with locked(self.path, f"{LOCK}-{unit}"):
                yield not self.is_finished(unit)  # Another process may have finished it meanwhile.
                if self.is_finished(unit):
                    self._remove_locks(unit)
        except FolderInUseError:
            yield False

    def read_spec(self) -> dict[str, Any] | None:
        """Returns the spec of the job in the folder as a JSON object; None if the folder is new or empty.

        Raises:
            JobFolderError: If the folder holds other files, or the manifest is damaged or of another version.
        """
        path = self.path / MANIFEST
        manifest = files.read_object(path)
        if manifest is None or manifest.get("kind") != self.kind:
            files.check_own(self.path, self.kind)
            return None
        if manifest.get("format_version") != self.version:
            raise JobFolderError(
                f"{path}: {self.kind} of another version of jacobiflow; use them with that version, or give another "
                "folder"
            )
        spec = manifest.get("spec")
        if not isinstance(spec, dict) or files.sha256(files.json_bytes(spec)) != manifest.get("spec_sha256"):
            raise JobFolderError(f"{path}: has changed since it was written; restore it, or give another folder")
        return spec

    def start(self, spec: Any, earlier_spec: Any, machine: Mapping[str, Any]) -> None:
        """Writes the manifest, or checks that the job in the folder is of the same spec.

        Args:
            spec: The spec, a dataclass.
            earlier_spec: The spec that the job in the folder must have; that of fewer units may differ from `spec`.
            machine: The machine of this process, see `jacobiflow.utils.timing.describe_machine`.

        Raises:
            JobFolderError: If the folder holds a job of another spec; the message names all differences.
        """
        earlier, new = self.read_spec(), serialization.encode(spec)
        if earlier is not None:
            want = serialization.encode(earlier_spec)
            names = [name for name in {**earlier, **want} if earlier.get(name) != want.get(name)]
            if names:
                texts = "; ".join(_describe_difference(name, earlier.get(name), want.get(name)) for name in names)
                raise JobFolderError(f"{self.path}: holds {self.kind} of {texts}; give another folder, or overwrite it")
            if self.read_result() is None and self.machine() != machine:
                warnings.warn(
                    f"{self.path}: begun on another machine or by other versions: equal to rounding, not to the bit",
                    stacklevel=2,
                )
        if earlier != new:
            (self.path / self.result_name).unlink(missing_ok=True)
            manifest = {
                "kind": self.kind, "format_version": self.version,
                "machine": machine if earlier is None else self.machine(),
                "spec_sha256": files.sha256(files.json_bytes(new)), "spec": new,
            }  # fmt: skip
            files.write_json(self.path / MANIFEST, manifest)

    def machine(self) -> dict[str, Any]:
        """Returns the machine on which the job began."""
        return dict(files.read_json(self.path / MANIFEST)["machine"])

    def write(self, unit: str, output: UnitOutput) -> None:
        """Writes the files of a unit, then its record; the unit is finished once the record is there."""
        for name, content in output.files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # After a loss of power the record may be there without the files; their checksums show it.
            files.write_atomically(path, content, sync=False)
        checksums = {name: files.sha256(content) for name, content in output.files.items()}
        self._record_file(unit).parent.mkdir(exist_ok=True)
        files.write_json(self._record_file(unit), {"files": checksums, "value": output.value})

    def is_finished(self, unit: str) -> bool:
        """Tells whether a unit has a record."""
        return self._record_file(unit).exists()

    def value(self, unit: str) -> Any:
        """Returns the value of a finished unit."""
        record = self._read_record(unit)
        if record is None:
            raise JobFolderError(
                f"{self._record_file(unit)}: missing or damaged; run the same command again, which restores it"
            )
        return record["value"]

    def is_intact(self, unit: str) -> bool:
        """Tells whether a unit is finished, and its files match their checksums."""
        record = self._read_record(unit)
        try:
            return record is not None and all(
                files.sha256(self.path / name) == checksum for name, checksum in record["files"].items()
            )
        except OSError:
            return False

    def discard_damaged(self, units: Sequence[str]) -> bool:
        """Removes the result, and the records of damaged units, so that they are computed again; tells if any are."""
        damaged = [unit for unit in units if not self.is_intact(unit)]
        for unit in damaged:
            (self.path / self.result_name).unlink(missing_ok=True)
            self._record_file(unit).unlink(missing_ok=True)
        if damaged:
            warnings.warn(f"{self.path}: {format_value(damaged)} were damaged, and are computed again", stacklevel=2)
        return bool(damaged)

    def write_result(self, result: Any) -> None:
        """Writes the result, and removes locks and temporary files of killed processes."""
        files.write_json(self.path / self.result_name, result)
        self._remove_locks("*")
        for folder in {self.path, *(path.parent for path in self.path.rglob(".*.partial"))}:
            files.remove_partials(folder)

    def read_result(self) -> Any:
        """Returns the result as a JSON object; None if the job is not complete."""
        return files.read_object(self.path / self.result_name)

    def clear(self, patterns: Sequence[str]) -> None:
        """Removes the job: its result, records and files, which the glob patterns name, but no other file."""
        (self.path / self.result_name).unlink(missing_ok=True)
        paths = [path for pattern in ("units/*.json", *patterns) for path in sorted(self.path.glob(pattern))]
        for path in paths:
            path.unlink()
        for folder in sorted({path.parent for path in paths} | {self.path / "images"}, reverse=True):
            with suppress(OSError):  # The folder is not empty.
                if folder != self.path:
                    folder.rmdir()
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _remove_locks(self, units: str) -> None:
        for path in self.path.glob(f"{LOCK}-{units}"):
            with suppress(OSError):  # Windows removes no open file.
                path.unlink()

    def _read_record(self, unit: str) -> dict[str, Any] | None:
        record = files.read_object(self._record_file(unit))
        return record if record is not None and isinstance(record.get("files"), dict) and "value" in record else None

    def _record_file(self, unit: str) -> Path:
        return self.path / "units" / f"{unit}.json"


def _describe_difference(name: str, earlier: Any, new: Any) -> str:
    """Describes an entry in which two specs differ; checksums say only that something is other."""
    if name.endswith("_sha256"):
        return f"other {name.removesuffix('_sha256')}"
    return f"{name.replace('_', ' ')} {format_value(earlier)}, not {format_value(new)}"
