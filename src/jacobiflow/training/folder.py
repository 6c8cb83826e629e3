"""The folder of a training run: its checkpoint and its metrics."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from jacobiflow.errors import InputError, InputValueError, first_line
from jacobiflow.utils.checks import format_value
from jacobiflow.utils.files import parse_json, regular_file, write_atomically

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
_REMEDY = "move it away, or give another folder"


@dataclass(frozen=True)
class TrainMetrics:
    """Metrics of one optimiser step; the first is step 1.

    Attributes:
        loss: mean(z^2) / 2 - log-det / D of the batch.
        bits_per_dim: Of the noisy images of the batch, under a standard normal prior.
        grad_norm: Before clipping.
        seconds: Of training so far, over all runs.
    """

    step: int
    loss: float
    bits_per_dim: float
    grad_norm: float
    rate: float
    seconds: float

    def line(self) -> str:
        """Returns the line of `metrics.jsonl`."""
        return json.dumps({name: round(x, 6) for name, x in asdict(self).items()}) + "\n"


def read_metrics(folder: str | Path) -> list[TrainMetrics]:
    """Reads the metrics of a training run; none if its folder has no metrics.jsonl.

    A last line that a kill cut short is left out.
    """
    path = Path(folder) / METRICS
    lines = regular_file(path).read_bytes().splitlines(keepends=True) if path.exists() else []
    reports = []
    for number, line in enumerate(lines, 1):
        try:
            reports.append(msgspec.convert(parse_json(line), TrainMetrics))
        except (InputError, msgspec.ValidationError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputValueError(f"{path}: line {number} is not of this trainer ({error}); {_REMEDY}") from error
    return reports


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training run, from which it resumes; `run` describes its flow, settings and images."""

    run: dict[str, Any]
    step: Annotated[int, msgspec.Meta(ge=0)]
    seconds: float
    flow: dict[str, Any]
    average: dict[str, Any]
    optimizer: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Reads a checkpoint. Raises ValueError if the file is broken."""
        try:
            return msgspec.convert(torch.load(regular_file(path), map_location="cpu", weights_only=True), cls)
        except Exception as error:  # torch.load documents none, and damage can raise nearly any
            raise InputValueError(f"{path}: not a checkpoint ({first_line(error)}); {_REMEDY}") from error

    def write(self, path: Path) -> None:
        """Writes the file as a whole."""
        data = io.BytesIO()
        torch.save(vars(self), data)
        write_atomically(path, data.getvalue())


def last_checkpoint(out: Path, run: dict[str, Any]) -> Checkpoint | None:
    """Returns the checkpoint in a folder of this run, or None if the folder is new or empty."""
    path = out / CHECKPOINT
    if not path.exists():
        others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
        if others:
            raise InputValueError(f"{out}: holds {others[0]}, and no {CHECKPOINT}; give a new or empty folder")
        return None
    checkpoint = Checkpoint.read(path)
    names = [name for name in {**checkpoint.run, **run} if checkpoint.run.get(name) != run.get(name)]
    if names:
        differences = "; ".join(
            f"{n}={format_value(checkpoint.run.get(n))}, not {format_value(run.get(n))}" for n in names
        )
        raise InputValueError(f"{path}: of another run ({differences}); give its settings, or another folder")
    return checkpoint


def problems(path: Path) -> Iterator[str]:
    """Finds problems of the training run in a folder, one line each, with the remedy."""
    try:
        step = Checkpoint.read(path / CHECKPOINT).step
        missing = set(range(1, step + 1)) - {report.step for report in read_metrics(path)}
        if missing:
            yield f"{path / METRICS}: lacks {len(missing):,} of {step:,} steps; training goes on without them"
    except InputError as error:
        yield str(error)
