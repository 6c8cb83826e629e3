"""What is wrong with a model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from jacobiflow.files import partials
from jacobiflow.flows.folder import CONFIG, README, REPORTS, WEIGHTS, ModelFolder
from jacobiflow.flows.registry import load
from jacobiflow.flows.weights import CheckpointError

_Read = TypeVar("_Read")


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the model in a folder, and what to do: a line each, none where `jacobiflow.load` takes it.

    What is wrong with its reports, `jacobiflow.Report` says.
    """
    if not path.is_dir():
        yield f"{path}: no folder; give one with {CONFIG} and {WEIGHTS}"
        return
    found: list[str] = []
    folder, weights = _try(lambda: ModelFolder.open(path), found), _try(ModelFolder(path, "", {}).state, found)
    if folder is not None and weights is not None:
        _try(lambda: load(path), found)
    yield from found
    for name in (CONFIG, WEIGHTS, *REPORTS, README):
        for left in partials(path, name):
            yield f"{left}: left by a process that was killed; write the model again, or remove it"


def _try(read: Callable[[], _Read], problems: list[str]) -> _Read | None:
    try:
        return read()
    except CheckpointError as error:
        problems.append(str(error))
        return None
