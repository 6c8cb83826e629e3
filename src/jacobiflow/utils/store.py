"""Finished measurements, kept in a folder so that an interrupted run continues and processes share them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jacobiflow.utils import serialization
from jacobiflow.utils.files import LOCK, MANIFEST, read_object, remove_partials, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class MeasurementStore:
    """Measurements as JSON files of a folder.

    Args:
        folder: Folder of the files; `None` stores nothing.
        key: Checksum of all that the measurements depend on. A file with another key is measured again.
    """

    folder: Path | None = None
    key: str = ""

    def load(self, name: str, declared: type[T]) -> T | None:
        """Returns the stored measurement of type `declared`; None if it is missing, damaged or has another key."""
        stored = None if self.folder is None else read_object(self._file(name))
        if stored is not None and stored.get("key") == self.key:
            with suppress(ValueError):  # It is damaged, or of another version.
                return serialization.decode(declared, stored["part"])
        return None

    def has(self, name: str) -> bool:
        """Tells whether a measurement is stored."""
        return self.folder is not None and (read_object(self._file(name)) or {}).get("key") == self.key

    def save(self, name: str, value: object) -> None:
        """Stores a measurement."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._file(name), {"key": self.key, "part": serialization.encode(value)}, indent=None)

    def load_or_measure(self, name: str, declared: type[T], measure: Callable[[], T]) -> T:
        """Returns the stored measurement of type `declared`, or calls `measure` and stores its result."""
        value = self.load(name, declared)
        if value is None:
            value = measure()
            self.save(name, value)
        return value

    def remove(self) -> None:
        """Removes the stored measurements, and their folder if it holds no other files."""
        if self.folder is None or not self.folder.is_dir():
            return
        remove_partials(self.folder)
        for file in self.folder.glob("*.json"):
            if (read_object(file) or {}).keys() == {"key", "part"}:
                file.unlink()
        if {entry.name for entry in self.folder.iterdir()} <= {LOCK, MANIFEST}:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.json"
