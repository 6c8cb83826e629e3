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
_FORMAT_VERSION = 2  # of checkpoint.pt
_REMEDY = "move it away, or give another folder"


@dataclass(frozen=True)
class TrainMetrics:
    """Metrics of one optimizer step.

    Attributes:
        step: Number of the step, from 1.
        loss: mean(z^2) / 2 - log-det / D of the batch.
        bits_per_dim: Bits per dimension of the noisy images of the batch, under a standard normal prior.
        grad_norm: Norm of the gradient before clipping.
        rate: Learning rate.
        seconds: Seconds of training so far, over all runs.
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
    """Reads the metrics of a training run; an empty list if its folder has no metrics.jsonl.

    A truncated last line is ignored.
    """
    path = Path(folder) / METRICS
    lines = regular_file(path).read_bytes().splitlines(keepends=True) if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(msgspec.convert(parse_json(line), TrainMetrics))
        except (InputError, msgspec.ValidationError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputValueError(f"{path}: line {number} is not of this trainer ({error}); {_REMEDY}") from error
    return metrics


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state from which a training run resumes; `run` describes its flow, settings and images."""

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
            entries = torch.load(regular_file(path), map_location="cpu", weights_only=True)
            checkpoint = msgspec.convert(entries, cls)
        except Exception as error:  # torch.load raises many kinds of exceptions.
            raise InputValueError(f"{path}: not a checkpoint ({first_line(error)}); {_REMEDY}") from error
        if entries.get("format_version") != _FORMAT_VERSION:
            raise InputValueError(
                f"{path}: made by an earlier version of jacobiflow; go on with that version, or {_REMEDY}"
            )
        return checkpoint

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        data = io.BytesIO()
        torch.save({"format_version": _FORMAT_VERSION, **vars(self)}, data)
        write_atomically(path, data.getvalue())


def last_checkpoint(out: Path, run: dict[str, Any]) -> Checkpoint | None:
    """Returns the checkpoint of this run; None if its folder is new or empty."""
    path = out / CHECKPOINT
    if not path.exists():
        for entry in out.iterdir():
            if not entry.name.startswith("."):
                raise InputValueError(f"{out}: holds {entry.name}, and no {CHECKPOINT}; give a new or empty folder")
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
    """Yields a line for each problem of the training run in a folder, with the remedy."""
    try:
        step = Checkpoint.read(path / CHECKPOINT).step
        missing = set(range(1, step + 1)) - {metrics.step for metrics in read_metrics(path)}
        if missing:
            yield f"{path / METRICS}: lacks {len(missing):,} of {step:,} steps; training goes on without them"
    except InputError as error:
        yield str(error)
