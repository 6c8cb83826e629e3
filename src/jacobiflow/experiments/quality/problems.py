"""All that is wrong with the folder of an experiment, for whoever has to repair it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jacobiflow.errors import InputError, InputValueError
from jacobiflow.experiments.quality.experiment import slug
from jacobiflow.experiments.quality.folder import FIGURES, KEYS, PLACES, SETTINGS, exact_in, plans_in
from jacobiflow.files import check_ours, read_object
from jacobiflow.locking import LOCK
from jacobiflow.storage import CONTENTS, SampleFolder
from jacobiflow.storage import problems as problems_of_samples
from jacobiflow.storage.problems import foreign, leftovers, use
from jacobiflow.strategy import Strategy

_SHARED = ("fingerprint", "seed", "guidance", "denoise", "batch_size", "shard_size")  # of the settings and each row


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a comparison and its rows, and what to do about it, a line each; nothing is changed.

    A run that is writing to the folder, and files that no run wrote, are mentioned too.
    """
    yield from use(path)
    if not (path / SETTINGS).is_file():
        yield f"{path}: no {SETTINGS} in it; give the folder of a comparison, or restore it"
    plans, exact = list(plans_in(path)), list(exact_in(path))
    checks: tuple[Callable[[], Any], ...] = (
        *(partial(check_ours, path / name, keys) for name, keys in KEYS.items()),
        *(partial(Strategy.load, plan) for plan in plans),
        *(partial(_check_exact, file) for file in exact),
    )
    for check in checks:
        yield from _refusal(check)
    rows = [row for row in sorted(path.glob("rows/*")) if any((row / name).exists() for name in CONTENTS)]
    for row in rows:
        yield from problems_of_samples(row)
        yield from _not_a_row(row, read_object(path / SETTINGS) or {})
    yield from leftovers(path / place for place in PLACES)
    yield from foreign(path, (*plans, *exact, *(path / name for name in (*KEYS, *FIGURES, LOCK))), rows)


def _refusal(check: Callable[[], Any]) -> Iterator[str]:
    try:
        check()
    except InputError as error:
        yield str(error)


def _check_exact(file: Path) -> None:
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
        good = isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype.kind == "f"
    except (OSError, ValueError, EOFError):
        good = False
    if not good:
        raise InputValueError(f"{file}: holds no images; remove it, it is drawn again where it is needed")


def _not_a_row(row: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Why samples are no row of an experiment of these settings."""
    try:
        manifest = SampleFolder.open(row).manifest
    except InputError:
        return
    if row.name != slug(manifest.strategy):
        yield f"{row}: holds samples of {manifest.strategy}, not of a row of this name; move it away"
    for name in _SHARED:
        if settings and getattr(manifest, name) != settings.get(name):
            yield f"{row}: holds samples of another {name} than {SETTINGS} says; move it away, and compare again"
