"""The folder of an experiment: what it was begun with, and that nothing else is taken for it.

settings.json      what all rows have in common
plans/auto.json    the strategy of each row of "auto"
timings.json       seconds of a batch of each row
rows/jacobi-30/    the samples of each row, as `jacobiflow.storage` writes them
exact/00000000.npy the exact images of each shard, not rounded to 8 bits
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jacobiflow.experiments.quality.experiment import Experiment
from jacobiflow.files import json_bytes, read_object, sha256, write_json
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.storage import MANIFEST, SampleFolder, labels_sha256
from jacobiflow.strategy import is_auto

FIGURES = ("comparison.json", "comparison.png")  # which the command line writes
SETTINGS, TIMINGS = "settings.json", "timings.json"


def begin(experiment: Experiment, overwrite: bool = False) -> None:
    """Make the folder, or check that what it holds was begun with the same settings; plan the rows of "auto".

    **Arguments:** `overwrite` removes the experiment that is in the folder, and begins anew. Files that no experiment
    writes are left alone.

    **Raises** `ValueError` where the folder holds something else, that names what differs, or where "auto" cannot be
    planned; the folder is then as it was.
    """
    out, settings = experiment.out, _settings(experiment)
    rows = _rows(out)
    if (out / SETTINGS).exists() or rows:
        _check_ours(out, rows, overwrite)
    resumed = (out / SETTINGS).exists() and not overwrite
    if resumed:
        _check_same(experiment, settings, rows)
    new = [name for name in experiment.names if is_auto(name) and not (resumed and experiment.plan_file(name).exists())]
    plans = {name: experiment.choose(name) for name in new}
    if overwrite:
        _remove(out, rows)
    out.mkdir(parents=True, exist_ok=True)
    if not resumed:
        write_json(out / SETTINGS, settings)
    for name, plan in plans.items():
        experiment.plan_file(name).parent.mkdir(exist_ok=True)
        plan.save(experiment.plan_file(name))


def largest_row(out: Path) -> int:
    """How many samples the largest row in a folder has, or is to have; 0 where there is none."""
    return max((row.manifest.num for row in _rows(out)), default=0)


def _settings(experiment: Experiment) -> dict[str, Any]:
    guidance, report = experiment.guidance, experiment.report
    return {
        "fingerprint": fingerprint(experiment.flow),
        "dtype": str(experiment.flow.var.dtype),
        "seed": experiment.seed,
        "guidance": None if guidance is None else asdict(guidance),
        "denoise": float(experiment.denoise),
        "batch_size": experiment.batch_size,
        "shard_size": experiment.shard_size,
        "report": None if report is None else sha256(json_bytes(report.to_json())),
    }


def _rows(out: Path) -> list[SampleFolder]:
    """**Raises** `ValueError` for a manifest that `jacobiflow.storage` has not written."""
    return [SampleFolder.open(manifest.parent) for manifest in sorted(out.glob(f"rows/*/{MANIFEST}"))]


def _check_ours(out: Path, rows: list[SampleFolder], overwrite: bool) -> None:
    """**Raises** `ValueError` where the folder is of something else, or can only be begun anew."""
    held = read_object(out / SETTINGS)
    if held is not None and {"fingerprint", "shard_size"} <= set(held):
        return
    if not rows:
        raise ValueError(f"{out / SETTINGS}: was not written by an experiment, and is left alone; give another folder")
    if not overwrite:
        raise ValueError(
            f"{out}: holds rows, but {SETTINGS} is lost or broken; restore it, or begin anew with overwrite=True"
        )


def _check_same(experiment: Experiment, settings: dict[str, Any], rows: Iterable[SampleFolder]) -> None:
    """**Raises** `ValueError` that names a setting, or a row's labels, in which the folder differs."""
    remedy = "give another folder, or overwrite=True to replace them"
    held = read_object(experiment.out / SETTINGS) or {}
    for name, value in settings.items():
        if held.get(name) != value:
            raise ValueError(f"{experiment.out}: holds samples of {name} {held.get(name)}, not {value}; {remedy}")
    for row in rows:
        labels = experiment.first_labels(row.manifest.num, row.path)
        if labels_sha256(labels) != row.manifest.labels_sha256:
            raise ValueError(f"{row.path}: holds samples of other labels; {remedy}")


def _remove(out: Path, rows: Iterable[SampleFolder]) -> None:
    for row in rows:
        row.clear()
    files = [out / name for name in (SETTINGS, TIMINGS, *FIGURES)]
    for path in (*files, *out.glob("plans/auto*.json"), *out.glob("exact/" + 8 * "[0-9]" + ".npy")):
        path.unlink(missing_ok=True)
