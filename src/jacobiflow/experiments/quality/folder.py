"""The folder of an experiment: what it was begun with, and that nothing else is taken for it.

settings.json      what all rows have in common
plans/auto.json    the strategy of each row of "auto"
timings.json       seconds of a batch of each row
rows/jacobi-30/    the samples of each row, as `jacobiflow.storage` writes them
exact/00000000.npy the exact images of each shard, not rounded to 8 bits
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jacobiflow.errors import InputError, InputValueError
from jacobiflow.experiments.quality.experiment import Experiment, slug
from jacobiflow.files import check_ours, json_bytes, read_object, remove_partials, sha256, write_json
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.precision import precision
from jacobiflow.locking import LOCK, locked
from jacobiflow.storage import MANIFEST, SampleFolder, labels_sha256
from jacobiflow.strategy import Strategy, is_auto

FIGURES = ("comparison.json", "comparison.png")  # which the command line writes
SETTINGS, TIMINGS = "settings.json", "timings.json"
PLACES = ("", "plans", "exact")  # which hold files of the experiment itself
# By what entries a file is known to be ours.
KEYS = {
    SETTINGS: {"fingerprint", "dtype", "seed", "guidance", "denoise", "batch_size", "shard_size", "report"},
    TIMINGS: {"machine", "repeats", "labels_sha256", "batch_size", "denoise_seconds", "rows"},
    FIGURES[0]: {"model", "distance", "against", "timings", "rows", "final"},
}


def begin(experiment: Experiment, overwrite: bool = False) -> None:
    """Make the folder, or check that what it holds was begun with the same settings; plan the rows of "auto".

    **Arguments:** `overwrite` removes the experiment that is in the folder, and begins anew. Files that no experiment
    writes are left alone.

    **Raises** `ValueError` where the folder holds something else, that names what differs, or where "auto" cannot be
    planned; the folder is then as it was.
    """
    out, settings = experiment.out, _settings(experiment)
    rows = rows_in(out)
    _check_ours(out, rows, overwrite)
    resumed = (out / SETTINGS).exists() and not overwrite
    if resumed:
        _check_same(experiment, settings, rows)
    planned = [name for name in experiment.names if is_auto(name)]
    for name in planned:
        if experiment.plan_file(name).exists():
            Strategy.load(experiment.plan_file(name))
    new = [name for name in planned if not (resumed and experiment.plan_file(name).exists())]
    plans = {name: experiment.choose(name) for name in new}
    if overwrite:
        _remove(out, rows)
    out.mkdir(parents=True, exist_ok=True)
    for place in PLACES:
        remove_partials(out / place)
    if not resumed:
        write_json(out / SETTINGS, settings)
    for name, plan in plans.items():
        experiment.plan_file(name).parent.mkdir(exist_ok=True)
        plan.save(experiment.plan_file(name))


def largest_row(out: Path) -> int:
    """How many samples the largest row in a folder has, or is to have; 0 where there is none."""
    return max((row.manifest.num for row in rows_in(out)), default=0)


def rows_in(out: Path) -> list[SampleFolder]:
    """The rows of the experiment in a folder. **Raises** `ValueError` where one has a manifest that is not ours."""
    rows = [SampleFolder.open(manifest.parent) for manifest in sorted(out.glob(f"rows/*/{MANIFEST}"))]
    return [row for row in rows if row.path.name == slug(row.manifest.strategy)]


def plans_in(out: Path) -> Iterator[Path]:
    """The files in a folder that have the name of a plan."""
    return (path for path in sorted(out.glob("plans/auto*.json")) if re.fullmatch(r"auto(-[-0-9.e]+)?", path.stem))


def exact_in(out: Path) -> Iterator[Path]:
    """The files in a folder that have the name of exact images."""
    return (path for path in sorted(out.glob("exact/*.npy")) if re.fullmatch("[0-9]{8}", path.stem))


def _settings(experiment: Experiment) -> dict[str, Any]:
    guidance, report = experiment.guidance, experiment.report
    return {
        "fingerprint": fingerprint(experiment.flow),
        "dtype": precision(experiment.flow),
        "seed": experiment.seed,
        "guidance": None if guidance is None else asdict(guidance),
        "denoise": float(experiment.denoise),
        "batch_size": experiment.batch_size,
        "shard_size": experiment.shard_size,
        "report": None if report is None else sha256(json_bytes(report.to_json())),
    }


def _check_ours(out: Path, rows: list[SampleFolder], overwrite: bool) -> None:
    """**Raises** `ValueError` where the folder is of something else, or can only be begun anew."""
    for name, keys in KEYS.items():
        check_ours(out / name, keys)
    if (out / SETTINGS).exists():
        return
    if rows and not overwrite:
        raise InputValueError(
            f"{out}: holds rows, but {SETTINGS} is lost; restore it, or begin anew with overwrite=True"
        )
    held = [] if rows else [*plans_in(out), *exact_in(out)]
    if held:
        raise InputValueError(f"{held[0]}: is there, but no {SETTINGS}; restore it, or give another folder")


def _check_same(experiment: Experiment, settings: dict[str, Any], rows: Iterable[SampleFolder]) -> None:
    """**Raises** `ValueError` that names a setting, or a row's labels, in which the folder differs."""
    remedy = "give another folder, or overwrite=True to replace them"
    held = read_object(experiment.out / SETTINGS) or {}
    for name, value in settings.items():
        if held.get(name) != value:
            raise InputValueError(f"{experiment.out}: holds samples of {name} {held.get(name)}, not {value}; {remedy}")
    for row in rows:
        labels = experiment.first_labels(row.manifest.num, row.path)
        if labels_sha256(labels) != row.manifest.labels_sha256:
            raise InputValueError(f"{row.path}: holds samples of other labels; {remedy}")


def _remove(out: Path, rows: Sequence[SampleFolder]) -> None:
    """Remove an experiment, its settings last: without these, what is left would not be known to be ours."""
    with ExitStack() as stack:
        for row in rows:  # all of them first: one that is in use keeps all
            stack.enter_context(locked(row.path))
        for row in rows:
            row.clear()
            (row.path / LOCK).unlink()
    plans = (path for path in plans_in(out) if _is_strategy(path))
    for path in (*plans, *exact_in(out), *(out / name for name in (TIMINGS, FIGURES[0], SETTINGS))):
        path.unlink(missing_ok=True)
    for folder in (*(row.path for row in rows), *(out / name for name in ("rows", "plans", "exact"))):
        with suppress(OSError):  # it holds something else
            folder.rmdir()


def _is_strategy(path: Path) -> bool:
    try:
        Strategy.load(path)
    except InputError:
        return False
    return True
