"""All that is wrong with a folder of samples, for whoever has to repair it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from jacobiflow.errors import InputError
from jacobiflow.files import partials
from jacobiflow.locking import LOCK, in_use
from jacobiflow.storage.folder import SampleFolder
from jacobiflow.storage.names import CONTENTS, SHEET, places


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a folder of samples, and what to do about it, a line each; nothing is changed.

    A run that is writing to the folder, and files that no run wrote, are mentioned too.
    """
    yield from use(path)
    try:
        folder = SampleFolder.open(path)
        yield from folder.problems()
        yield from leftovers(places(path, folder.manifest))
        yield from foreign(path, (*folder.named(), *(path / name for name in (*CONTENTS, SHEET, LOCK))))
    except InputError as error:
        yield str(error)
    except OSError as error:
        yield f"{error.filename or path}: cannot be read ({error.strerror}); make it readable"


def use(path: Path) -> Iterator[str]:
    """Whether a run is writing to a folder."""
    if in_use(path):
        yield f"{path}: a run is writing to it; wait for its end, what follows may be of the moment"


def leftovers(places: Iterable[Path]) -> Iterator[str]:
    """The partial files in some folders."""
    for place in places:
        yield from (
            f"{path}: half-written by a run that was stopped; the next one removes it" for path in partials(place)
        )


def foreign(path: Path, ours: Iterable[Path], rows: Iterable[Path] = ()) -> Iterator[str]:
    """The files below a folder, but not below `rows`, that are not `ours`."""
    known, skipped, others = set(ours), set(rows), []
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if Path(place) / name not in skipped]
        files = {Path(place) / name for name in names}
        others += sorted(files - known - set(partials(Path(place))))
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        yield f"{others[0]}{more}: not of the run, which leaves them alone"
