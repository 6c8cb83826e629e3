"""What an unfinished calibration has measured, kept beside its report so that the same call goes on from there.

OUT.partial/settings.json  a checksum of all that the measurements depend on
OUT.partial/*.json         what is finished, each file whole
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jacobiflow import codec
from jacobiflow.errors import InputValueError
from jacobiflow.files import read_object, remove_partials, write_json
from jacobiflow.locking import LOCK, locked

T = TypeVar("T")
_SETTINGS, _KEY = "settings.json", "calibration"
_NAME = re.compile(r"(settings|report|block-[0-9]+)\.json")


@dataclass(frozen=True)
class Kept:
    """The folder of what is finished; with `None` nothing is kept."""

    path: Path | None = None

    def once(self, name: str, declared: type[T], make: Callable[[], T]) -> T:
        """What `make` returns, of the type `declared`: as it was kept under `name`, or else made and kept."""
        if self.path is None:
            return make()
        file = self.path / f"{name}.json"
        with suppress(ValueError):  # missing, or damaged: made again
            return codec.load(file, name, lambda value: codec.decode(declared, value))
        made = make()
        write_json(file, codec.encode(made), indent=None)
        return made


@contextmanager
def keeping(out: Path | None, key: Callable[[], str]) -> Iterator[Kept]:
    """What the calibration with this `key` has kept beside `out`; removed when the block ends without an error.

    What another calibration has kept there is removed first.

    **Raises** `FolderInUseError`, a `ValueError`, where another process calibrates to `out`, and `ValueError` where the
    folder beside it holds anything else.
    """
    if out is None:
        yield Kept()
        return
    folder = out.with_name(f"{out.name}.partial")
    with locked(folder):
        settings, wanted = read_object(folder / _SETTINGS), {_KEY: key()}
        if settings is None or settings.keys() != wanted.keys():
            if {entry.name for entry in folder.iterdir()} - {LOCK}:
                raise InputValueError(f"{folder}: was not made by a calibration; move it away, or give another file")
        elif settings != wanted:
            _empty(folder)
        if settings != wanted:
            write_json(folder / _SETTINGS, wanted)
        try:
            yield Kept(folder)
        except BaseException:
            if {entry.name for entry in folder.iterdir()} == {LOCK, _SETTINGS}:
                _empty(folder)
            raise
        _empty(folder)
        (folder / LOCK).unlink()
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def _empty(folder: Path) -> None:
    """Remove what calibrations keep, and nothing else."""
    remove_partials(folder)
    for file in folder.glob("*.json"):
        if _NAME.fullmatch(file.name):
            file.unlink()
