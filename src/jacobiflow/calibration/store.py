"""Finished measurements of a calibration, kept in a folder so that an interrupted run continues."""

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

    def load_or_measure(self, name: str, declared: type[T], measure: Callable[[], T]) -> T:
        """Returns the stored measurement of type `declared`, or calls `measure` and stores its result."""
        if self.folder is None:
            return measure()
        file = self.folder / f"{name}.json"
        stored = read_object(file) or {}
        if stored.get("key") == self.key:
            with suppress(ValueError):  # damaged, or of another version: measured again
                return serialization.decode(declared, stored["part"])
        value = measure()
        write_json(file, {"key": self.key, "part": serialization.encode(value)}, indent=None)
        return value

    def remove(self) -> None:
        """Removes the stored measurements, and their folder if it holds no other files."""
        if self.folder is None:
            return
        remove_partials(self.folder)
        for file in self.folder.glob("*.json"):
            if (read_object(file) or {}).keys() == {"key", "part"}:
                file.unlink()
        if {entry.name for entry in self.folder.iterdir()} == {LOCK, MANIFEST}:
            (self.folder / MANIFEST).unlink()
            (self.folder / LOCK).unlink()
            self.folder.rmdir()
