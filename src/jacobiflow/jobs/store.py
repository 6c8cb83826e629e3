"""The folder of a job.

manifest.json    the kind of job, its spec and the checksum of the spec, and the machine on which it began
units/NAME.json  the record of a finished unit: the checksums of its files, its value, and the checksum of both
...              the files of the units, under the names that the job gives them
RESULT           the result, under the name that the job gives it
.lock, .lock-*   locks of the folder, its units and its users, which the system releases when a process ends or dies

The processes that use a folder at the same time share these files. That of a unit is missing until one of them claims
the unit. Another one tells the others that the unit is settled: computed, or found intact. The first process that comes
to a folder without users removes the files of earlier ones.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from jacobiflow.errors import InputValueError
from jacobiflow.utils import files
from jacobiflow.utils.checks import format_value
from jacobiflow.utils.files import LOCK, MANIFEST, FolderInUseError, locked
from jacobiflow.utils.layout import LAYOUTS, RECORDS

_REPLACE = "give another folder, or overwrite or remove this one"
_MAX_DIFFERENCES = 3  # In the message about a job of another spec.
_USE = f"{LOCK}-use-"


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
class JobStore:
    """The manifest, the finished units and the result of a job of one kind, in a folder.

    Attributes:
        path: The folder.
        kind: The kind of job, such as "samples".
        version: Version of the format of this kind, in which jobs are written.
        result_name: Name of the file of the result.
        oldest: The oldest version that can be read.
    """

    path: Path
    kind: str
    version: int
    result_name: str
    oldest: int

    def lock(self) -> AbstractContextManager[None]:
        """Waits until no other process starts or reduces the job, and keeps them from it until the block ends."""
        return locked(self.path, wait=math.inf)

    def claim(self, unit: str) -> AbstractContextManager[None]:
        """Locks a unit until the block ends; raises FolderInUseError if another process has locked it."""
        return locked(self.path, self._lock_file(unit).name)

    def is_claimed(self, unit: str) -> bool:
        """Tells whether a process has claimed a unit, and may have died since."""
        return self._lock_file(unit).exists()

    def is_settled(self, unit: str) -> bool:
        """Tells whether a unit was computed or found intact by a process that used the folder with this one."""
        return self._settled_file(unit).exists()

    def settle(self, unit: str) -> None:
        """Lets the other processes know that a unit, which this one has claimed, needs no look any more."""
        self._settled_file(unit).touch()

    def use(self) -> AbstractContextManager[None]:
        """Keeps other processes from changing the spec until the block ends."""
        return locked(self.path, f"{_USE}{secrets.token_hex(8)}")

    def count_users(self) -> int:
        """Returns the number of processes that use the folder; if there are none, removes the files of their locks."""
        count = 0
        for path in self.path.glob(f"{_USE}*"):
            try:
                with locked(self.path, path.name), suppress(OSError):  # Windows removes no open file.
                    path.unlink()
            except FolderInUseError:
                count += 1
        if not count:
            for path in self.path.glob(f"{LOCK}-*"):
                path.unlink(missing_ok=True)
        return count

    def read_spec(self) -> dict[str, Any] | None:
        """Returns the spec of the job in the folder as a JSON object; None if it holds no job of this kind.

        Raises:
            JobFolderError: If the manifest is damaged or of another version.
        """
        manifest = files.read_object(self._manifest)
        if manifest is None and self._manifest.exists():
            raise JobFolderError(f"{self._manifest}: damaged; restore it, or {_REPLACE}")
        if manifest is None or manifest.get("kind") != self.kind:
            return None
        if manifest.get("format_version") not in range(self.oldest, self.version + 1):
            raise self._other_version(manifest)
        spec = manifest.get("spec")
        if not isinstance(spec, dict) or files.sha256(files.json_bytes(spec)) != manifest.get("spec_sha256"):
            raise JobFolderError(f"{self._manifest}: has changed since it was written; restore it, or {_REPLACE}")
        return spec

    def check_version(self) -> None:
        """Raises JobFolderError if the job in the folder is of another version, which cannot go on."""
        manifest = files.read_object(self._manifest)
        if manifest is not None and manifest.get("format_version") != self.version:
            raise self._other_version(manifest)

    def _other_version(self, manifest: Mapping[str, Any]) -> JobFolderError:
        return JobFolderError(
            f"{self._manifest}: {self.kind} in format {manifest.get('format_version')} of another version of "
            f"jacobiflow, which this one cannot go on with; use that version, or {_REPLACE}"
        )

    @property
    def _manifest(self) -> Path:
        return self.path / MANIFEST

    def check_spec(self, spec: Mapping[str, Any], remedy: str) -> None:
        """Raises JobFolderError if the job in the folder is of another spec; the message names some differences."""
        earlier = self.read_spec() or {}
        names = [name for name in {**earlier, **spec} if earlier.get(name) != spec.get(name)]
        if names:
            texts = [_describe_difference(name, earlier.get(name), spec.get(name)) for name in names[:_MAX_DIFFERENCES]]
            more = [f"and {len(names) - len(texts)} more"] * (len(names) > len(texts))
            raise JobFolderError(f"{self.path}: holds {self.kind} of {'; '.join([*texts, *more])}; {remedy}")

    def write_manifest(self, spec: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Starts a job, or changes its spec.

        Args:
            spec: The spec as a JSON object.
            machine: The machine on which the job began, see `jacobiflow.utils.timing.describe_machine`.
        """
        manifest = {
            "kind": self.kind, "format_version": self.version, "machine": machine,
            "spec_sha256": files.sha256(files.json_bytes(spec)), "spec": spec,
        }  # fmt: skip
        files.write_json(self._manifest, manifest)

    def machine(self) -> dict[str, Any]:
        """Returns the machine on which the job began."""
        return dict(files.read_json(self._manifest)["machine"])

    def write(self, unit: str, output: UnitOutput) -> None:
        """Writes the files of a unit, then its record; the unit is finished once the record is there.

        A result is out of date from now on, and is removed.
        """
        self.discard_result()
        for name, content in output.files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # After a loss of power the record may be there without the files; their checksums show it.
            files.write_atomically(path, content, sync=False)
        checksums = {name: files.sha256(content) for name, content in output.files.items()}
        record = {"files": checksums, "value": output.value}
        self._record_file(unit).parent.mkdir(exist_ok=True)
        files.write_json(self._record_file(unit), {**record, "sha256": files.sha256(files.json_bytes(record))})

    def has_record(self, unit: str) -> bool:
        """Tells whether a unit has a record, which may be damaged."""
        return self._record_file(unit).exists()

    def is_finished(self, unit: str) -> bool:
        """Tells whether a unit has an intact record."""
        return self._read_record(unit) is not None

    def value(self, unit: str) -> Any:
        """Returns the value of a finished unit."""
        return self._finished_record(unit)["value"]

    def checksums(self, unit: str) -> dict[str, str]:
        """Returns the checksum of each file of a finished unit, by the name of the file."""
        return dict(self._finished_record(unit)["files"])

    def _finished_record(self, unit: str) -> dict[str, Any]:
        record = self._read_record(unit)
        if record is None:
            raise JobFolderError(
                f"{self._record_file(unit)}: missing or damaged; run the same command again, which restores it"
            )
        return record

    def is_intact(self, unit: str) -> bool:
        """Tells whether a unit is finished, and its files match their checksums."""
        record = self._read_record(unit)
        try:
            return record is not None and all(
                files.sha256(self.path / name) == checksum for name, checksum in record["files"].items()
            )
        except OSError:
            return False

    def discard_unless_intact(self, unit: str) -> bool:
        """Returns whether a unit is intact. If its files have changed, removes its record, with a warning."""
        if self.is_intact(unit):
            return True
        if self.has_record(unit):
            self.discard_result()
            self._record_file(unit).unlink(missing_ok=True)
            warnings.warn(f"{self.path}: {unit} was damaged, and is computed again", stacklevel=4)
        return False

    def write_result(self, result: Any, units: Collection[str]) -> None:
        """Writes the result, a JSON object; removes temporary files of killed processes, and records of other units."""
        for pattern in self._patterns():
            files.remove_partials(self.path, pattern)
        for path in self.path.glob(RECORDS):
            if path.stem not in units and self.is_finished(path.stem):  # Not a file of another program.
                path.unlink()
        files.write_json(self.path / self.result_name, result)

    def read_result(self) -> Any:
        """Returns the result as a JSON object; None if the job is not complete."""
        return files.read_object(self.path / self.result_name)

    def discard_result(self) -> None:
        """Removes the result, since the job is not complete any more."""
        (self.path / self.result_name).unlink(missing_ok=True)

    def clear(self, kinds: Iterable[str]) -> None:
        """Removes the files that jobs of some kinds write, but neither the manifest nor other files."""
        patterns = self._patterns(kinds)[1:]
        for pattern in patterns:
            files.remove_partials(self.path, pattern)
        paths = [path for pattern in patterns for path in sorted(self.path.glob(pattern))]
        for path in paths:
            path.unlink(missing_ok=True)
        folders = {folder for path in paths for folder in path.parents if self.path in folder.parents}
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # The folder is not empty.
                folder.rmdir()

    def _patterns(self, kinds: Iterable[str] = ()) -> tuple[str, ...]:
        """Returns glob patterns of the manifest, the records and the files of jobs, by default of this kind."""
        return (MANIFEST, RECORDS, *chain(*(LAYOUTS[kind] for kind in kinds or (self.kind,))))

    def _read_record(self, unit: str) -> dict[str, Any] | None:
        """Returns the record of a unit; None if it is missing or damaged."""
        record = files.read_object(self._record_file(unit)) or {}
        checksum = record.pop("sha256", None)
        return record if record and files.sha256(files.json_bytes(record)) == checksum else None

    def _record_file(self, unit: str) -> Path:
        return self.path / "units" / f"{unit}.json"

    def _lock_file(self, unit: str) -> Path:
        return self.path / f"{LOCK}-unit-{unit}"

    def _settled_file(self, unit: str) -> Path:
        return self.path / f"{LOCK}-settled-{unit}"


def _describe_difference(name: str, earlier: Any, new: Any) -> str:
    """Describes an entry in which two specs differ; checksums say only that something is different."""
    if name.endswith("_sha256"):
        return f"different {name.removesuffix('_sha256').replace('_', ' ')}"
    return f"{name.replace('_', ' ')} {format_value(earlier)}, not {format_value(new)}"
