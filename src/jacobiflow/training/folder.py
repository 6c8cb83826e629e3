"""The folder of a training run.

run.json               the flow, the settings and the data, which a resumed run must share
checkpoint-0000000100  the state after that step; the last one only
metrics.jsonl          a line for each step
config.json, ...       the averaged flow of the last checkpoint, a model folder
tensorboard            the metrics, if TensorBoard is installed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from jacobiflow.errors import InputError, InputValueError, first_line
from jacobiflow.training.checkpoint import check_state, write_state
from jacobiflow.training.processes import barrier, rank
from jacobiflow.utils import files
from jacobiflow.utils.checks import format_value

RUN = "run.json"
METRICS = "metrics.jsonl"
_CHECKPOINT, _ANY_CHECKPOINT = "checkpoint-{:010d}", "checkpoint-" + 10 * "[0-9]"
_PARTIAL = ".checkpoint.partial"
_FORMAT_VERSION = 4
_REMEDY = "move it away, or give another folder"


@dataclass(frozen=True)
class TrainMetrics:
    """Metrics of one optimizer step.

    Attributes:
        step: Number of the step, from 1.
        loss: mean(z^2) / 2 - log-det / D of the batch, over all processes.
        bits_per_dim: Bits per dimension of the noisy images of the batch, under a standard normal prior; None for flows
            over tokens.
        grad_norm: Norm of the gradient before clipping.
        rate: Learning rate.
        seconds: Seconds of training so far, over all runs.
        held_out_loss: Loss of the averaged flow on held-out data; None between checkpoints.
    """

    step: int
    loss: float
    bits_per_dim: float | None
    grad_norm: float
    rate: float
    seconds: float
    held_out_loss: float | None = None

    def line(self) -> str:
        """Returns the line of `metrics.jsonl`."""
        return json.dumps(asdict(self)) + "\n"


def read_metrics(folder: str | Path) -> list[TrainMetrics]:
    """Reads the metrics of a training run; an empty list if its folder has no metrics.jsonl.

    A truncated last line is ignored.
    """
    path = Path(folder) / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(msgspec.json.decode(line, type=TrainMetrics))
        except msgspec.MsgspecError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputValueError(f"{path}: line {number} is not of this trainer ({error}); {_REMEDY}") from error
    return metrics


def start_or_resume(out: Path, run: Mapping[str, Any]) -> None:
    """Writes run.json, or checks that the folder is of the same run.

    Raises:
        ValueError: If the folder has other files, or is of another run.
    """
    path = out / RUN
    if not path.exists():
        for entry in sorted(out.iterdir()):
            if not entry.name.startswith("."):
                raise InputValueError(f"{out}: holds {entry.name}, and no {RUN}; give a new or empty folder")
        files.write_json(path, {"format_version": _FORMAT_VERSION, **run})
        return
    earlier = _read_run(path)
    run = json.loads(json.dumps(run))  # Tuples become lists, as in the file.
    names = [name for name in {**earlier, **run} if earlier.get(name) != run.get(name)]
    if names:
        differences = "; ".join(f"{n}={format_value(earlier.get(n))}, not {format_value(run.get(n))}" for n in names)
        raise InputValueError(f"{path}: of another run ({differences}); give its settings, or another folder")


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = files.read_json(path)
        version = run.pop("format_version")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputValueError(f"{path}: not of this trainer ({first_line(error)}); {_REMEDY}") from error
    if version != _FORMAT_VERSION:
        raise InputValueError(f"{path}: of another version of jacobiflow; go on with that version, or {_REMEDY}")
    return dict(run)


def last_checkpoint(out: Path) -> tuple[int, Path | None]:
    """Returns the step of the last checkpoint, and its folder; 0 and None if there is none."""
    paths = sorted(out.glob(_ANY_CHECKPOINT))
    return (int(paths[-1].name.rpartition("-")[2]), paths[-1]) if paths else (0, None)


def write_checkpoint(out: Path, step: int, state: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint, to which every process adds its part, and removes earlier ones."""
    path, partial = out / _CHECKPOINT.format(step), out / _PARTIAL
    if path.exists():
        return
    if rank() == 0:
        partial.mkdir()
    barrier()
    write_state(partial, state)
    if rank() == 0:
        partial.rename(path)
        remove_leftovers(out)


def remove_leftovers(out: Path) -> None:
    """Removes all checkpoints but the last one, and files that killed processes have left."""
    files.remove_partials(out)
    for path in (out / _PARTIAL, *sorted(out.glob(_ANY_CHECKPOINT))[:-1]):
        if path.exists():
            shutil.rmtree(path)


def remove_later(out: Path, step: int) -> None:
    """Removes the metrics of steps after `step`, which a run that resumes there takes again, and leftovers."""
    lines = [metrics.line() for metrics in read_metrics(out) if metrics.step <= step]  # May refuse the file.
    remove_leftovers(out)
    if (out / METRICS).exists():
        files.write_atomically(out / METRICS, "".join(lines).encode())


@contextmanager
def open_board(out: Path, step: int) -> Iterator[Callable[[TrainMetrics], None]]:
    """Yields a function that writes metrics after `step` for TensorBoard; it does nothing if that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda metrics: None
        return
    with SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) as writer:

        def write(metrics: TrainMetrics) -> None:
            for name, value in asdict(metrics).items():
                if value is not None and name != "step":
                    writer.add_scalar(name, value, metrics.step)

        yield write


def problems(path: Path) -> Iterator[str]:
    """Yields a line for each problem of the training run in a folder, with the remedy."""
    try:
        _read_run(path / RUN)
        step, checkpoint = last_checkpoint(path)
        if checkpoint is not None:
            check_state(checkpoint)
        missing = set(range(1, step + 1)) - {metrics.step for metrics in read_metrics(path)}
        if missing:
            yield f"{path / METRICS}: lacks {len(missing):,} of {step:,} steps; training goes on without them"
    except (InputError, OSError) as error:
        yield str(error)
