"""`jacobiflow doctor`: whether a folder is whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from jacobiflow import flows, storage, training
from jacobiflow.calibration import Report
from jacobiflow.cli import options, paths
from jacobiflow.cli.words import one_line
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.experiments import quality
from jacobiflow.flows.folder import CONFIG, WEIGHTS, bundled
from jacobiflow.flows.registry import load
from jacobiflow.latents import draw_latents
from jacobiflow.sampling import decode
from jacobiflow.storage import MANIFEST, SampleFolder

_CLOSE = 1e-3  # by which a latent may have changed after it was decoded and encoded


class _Kind(NamedTuple):
    """What a folder can be: the files by which it is recognised, what is wrong with one, and what one holds."""

    marks: tuple[str, ...]
    problems: Callable[[Path], Iterator[str]]
    describe: Callable[[Path], str]


def doctor(
    path: Annotated[str, typer.Argument(help="A model folder or a bundled name, or a folder of another command.")],
    json: options.Json = None,
) -> None:
    """Check a folder that a command wrote, to the last byte: a model, samples, a comparison, a training run.

    Each line is a problem, and what to do. Exits 0 where there is none.

    Example: jacobiflow doctor fashion-p2
    """
    folder = bundled().get(path, Path(path))
    paths.check(json, path=folder)
    found = [name for name, kind in _KINDS.items() if any((folder / mark).exists() for mark in kind.marks)]
    if not found:
        raise InputValueError(
            f"{path}: no model, samples, comparison or training run; give the folder of one, or a bundled model's name "
            f"({', '.join(bundled())})"
        )
    problems = [one_line(problem) for name in found for problem in _KINDS[name].problems(folder)]
    held = [] if problems else [f"{name} of {_KINDS[name].describe(folder)}" for name in found]
    options.report(json, {"path": str(folder), "checked": found, "problems": problems})
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{path}: no problem; checked {' and '.join(held)}")


def _model_problems(folder: Path) -> Iterator[str]:
    """What is wrong with the files, else with the reports, and with the way to images and back."""
    yield from flows.problems(folder)
    try:
        flow = load(folder)
    except InputError:
        return  # they have said why
    for file in flow.report_files:
        try:
            Report.load(file).check(flow)
        except InputError as error:
            yield str(error)
    z = draw_latents(1, flow.config.num_tokens, flow.config.token_channels, seed=0)
    labels = torch.zeros(1, dtype=torch.int64) if flow.config.num_classes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what overflows, as the line below says
        images = decode(flow, z, labels, strategy="sequential", certify=False).images
    change = float((flow.encode(images, labels)[0] - z).abs().max())
    if not change <= _CLOSE:  # or NaN
        yield (
            f"{folder}: a latent that is decoded and encoded again is off by {change:.1e}, more than {_CLOSE:g}; the "
            "weights are damaged or badly conditioned: copy the folder again, or train it on"
        )


def _describe_model(folder: Path) -> str:
    return f"{sum(p.numel() for p in load(folder).parameters()):,} weights, by one image there and back"


def _describe_samples(folder: Path) -> str:
    manifest = SampleFolder.open(folder).manifest
    return f"{manifest.num:,} images, shard by shard"


def _describe_comparison(folder: Path) -> str:
    rows = ", ".join(sorted(file.parent.name for file in folder.glob(f"rows/*/{MANIFEST}")))
    return f"the rows {rows}" if rows else "no row yet"


_KINDS = {
    "a model": _Kind((CONFIG, WEIGHTS), _model_problems, _describe_model),
    "samples": _Kind((MANIFEST,), storage.problems, _describe_samples),
    "a comparison": _Kind(("settings.json", "rows"), quality.problems, _describe_comparison),
    "a training run": _Kind(("checkpoint.pt",), training.problems, lambda folder: "a checkpoint and its metrics"),
}
