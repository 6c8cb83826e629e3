"""All that is wrong with a folder of samples, for whoever has to repair it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jacobiflow.locking import LOCK, in_use
from jacobiflow.storage.folder import CONTENTS, SHEET, SampleFolder
from jacobiflow.storage.manifest import SampleFolderError


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a folder of samples, and what to do about it, a line each; nothing is changed.

    A run that is writing to the folder, and files that no run wrote, are mentioned too.
    """
    if in_use(path):
        yield f"{path}: a run is writing to it; wait for it, as what follows may be of the moment"
    try:
        folder = SampleFolder.open(path)
    except SampleFolderError as error:
        yield str(error)
        return
    try:
        yield from folder.problems()
        for partial in (left := folder.partials()):
            yield f"{partial}: half-written by a run that was stopped; the next run removes it"
        foreign = sorted(_files(path) - {*folder.named(), *left, *(path / name for name in (*CONTENTS, SHEET, LOCK))})
    except OSError as error:
        yield f"{error.filename or path}: cannot be read ({error.strerror}); make it readable"
        return
    if foreign:
        others = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        yield f"{foreign[0]}{others}: not of the run, which leaves them alone"


def _files(path: Path) -> set[Path]:
    return {Path(place) / name for place, _, names in os.walk(path) for name in names}
