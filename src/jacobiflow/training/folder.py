"""The folder of a training run.

run.json             the flow, the settings and the data, which a resumed run must share
checkpoint-00000100  the state after that step, by torch.distributed.checkpoint; the last one only
metrics.jsonl        a line for each step
config.json, ...     the averaged flow of the last checkpoint, a model folder
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from jacobiflow.distributed import Processes
from jacobiflow.errors import InputError, InputValueError, first_line
from jacobiflow.utils.checks import format_value
from jacobiflow.utils.files import parse_json, read_json, regular_file, remove_partials, write_atomically, write_json

RUN = "run.json"
METRICS = "metrics.jsonl"
_CHECKPOINT, _ANY_CHECKPOINT = "checkpoint-{:08d}", "checkpoint-" + 8 * "[0-9]"
_PARTIAL = ".checkpoint.partial"
_FORMAT_VERSION = 3
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
        values = {name: x if x is None else round(x, 6) for name, x in asdict(self).items()}
        return json.dumps(values) + "\n"


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
        write_json(path, {"format_version": _FORMAT_VERSION, **run})
        return
    earlier = _read_run(path)
    run = parse_json(json.dumps(run).encode())  # Tuples become lists, as in the file.
    names = [name for name in {**earlier, **run} if earlier.get(name) != run.get(name)]
    if names:
        differences = "; ".join(f"{n}={format_value(earlier.get(n))}, not {format_value(run.get(n))}" for n in names)
        raise InputValueError(f"{path}: of another run ({differences}); give its settings, or another folder")


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = read_json(path)
        version = run.pop("format_version")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputValueError(f"{path}: not of this trainer ({first_line(error)}); {_REMEDY}") from error
    if version != _FORMAT_VERSION:
        raise InputValueError(f"{path}: of another version of jacobiflow; go on with that version, or {_REMEDY}")
    return dict(run)


def last_checkpoint(out: Path) -> tuple[int, Path] | None:
    """Returns the step of the last checkpoint, and its folder; None if there is none."""
    paths = sorted(out.glob(_ANY_CHECKPOINT))
    return (int(paths[-1].name[-8:]), paths[-1]) if paths else None


def write_checkpoint(out: Path, step: int, state: dict[str, Any], processes: Processes) -> None:
    """Writes a checkpoint, to which every process adds its part, and removes earlier ones."""
    path, partial = out / _CHECKPOINT.format(step), out / _PARTIAL
    processes.run_on_rank_zero(lambda: remove_leftovers(out))
    with _plain_errors():
        save_distributed(state, checkpoint_id=partial)

    def replace_earlier() -> None:
        partial.rename(path)
        remove_leftovers(out)

    processes.run_on_rank_zero(replace_earlier)


def remove_leftovers(out: Path) -> None:
    """Removes all checkpoints but the last one, and files that killed processes have left."""
    remove_partials(out)
    for path in (out / _PARTIAL, *sorted(out.glob(_ANY_CHECKPOINT))[:-1]):
        if path.exists():
            shutil.rmtree(path)


def trim_metrics(out: Path, step: int) -> None:
    """Removes the metrics of steps after `step`, which a run that resumes there takes again."""
    if (out / METRICS).exists():
        lines = [metrics.line() for metrics in read_metrics(out) if metrics.step <= step]
        write_atomically(out / METRICS, "".join(lines).encode())


def read_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Reads a checkpoint into the tensors of `state`; every process reads the parts that it holds."""
    try:
        regular_file(path / ".metadata")
        with _plain_errors():
            load_distributed(state, checkpoint_id=path)
    except Exception as error:  # It raises many kinds of exceptions for damaged files.
        raise InputValueError(f"{path}: damaged, or of another flow ({first_line(error)}); {_REMEDY}") from error


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises the error of a process in place of PyTorch's list of them, and hides a warning that there is only one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as errors:
        first_error, _ = next(iter(errors.failures.values()))
        raise first_error from errors


def problems(path: Path) -> Iterator[str]:
    """Yields a line for each problem of the training run in a folder, with the remedy."""
    try:
        _read_run(path / RUN)
        step, _ = last_checkpoint(path) or (0, path)
        missing = set(range(1, step + 1)) - {metrics.step for metrics in read_metrics(path)}
        if missing:
            yield f"{path / METRICS}: lacks {len(missing):,} of {step:,} steps; training goes on without them"
    except InputError as error:
        yield str(error)
