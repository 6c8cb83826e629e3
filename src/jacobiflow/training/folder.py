"""The folder of a training run.

manifest.json           the flow, the settings and the data, which a resumed run must share
checkpoint.safetensors  the state after a step, see `checkpoint`
metrics.jsonl           a line for each step
config.json, ...        the averaged flow of the checkpoint, a model folder
tensorboard             the metrics, if TensorBoard is installed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from jacobiflow.errors import InputError, InputValueError
from jacobiflow.jobs import JobStore
from jacobiflow.training.checkpoint import CHECKPOINT, check_checkpoint
from jacobiflow.training.processes import rank
from jacobiflow.utils import files
from jacobiflow.utils.layout import check_own

KIND = "training"
METRICS = "metrics.jsonl"


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


def _job_store(out: Path) -> JobStore:
    """Returns the folder as that of a job without units, for its manifest."""
    return JobStore(out, KIND, version=1, result_name=CHECKPOINT, oldest=1)


def write_or_check_manifest(out: Path, spec: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Writes the manifest of a run without a checkpoint, or checks that the folder is of the same run.

    Raises:
        InputValueError: If the folder has other files, or is of another run; the message names all differences.
    """
    check_own(out, KIND)
    manifest = _job_store(out)
    if manifest.read_spec() is None or not (out / CHECKPOINT).exists():
        manifest.write_manifest(spec, machine)
    remedy = "use its settings, data and random changes (such as --horizontal-flip), or another folder"
    manifest.check_spec(spec, remedy)


def read_metrics(folder: str | Path) -> list[TrainMetrics]:
    """Reads the metrics of a training run; an empty list if its folder has no metrics.jsonl.

    A truncated last line is ignored.
    """
    path = Path(folder) / METRICS
    content = path.read_bytes() if path.exists() else b""
    try:
        return msgspec.json.Decoder(TrainMetrics).decode_lines(content[: content.rfind(b"\n") + 1])
    except msgspec.MsgspecError as error:
        raise InputValueError(f"{path}: not of this trainer ({error}); move it away, or give another folder") from error


def append_metrics(out: Path, metrics: Sequence[TrainMetrics]) -> None:
    """Appends the metrics of some steps."""
    with (out / METRICS).open("ab") as file:
        file.write(msgspec.json.Encoder().encode_lines(metrics))


def remove_later(out: Path, step: int) -> None:
    """Removes the metrics of steps after `step`, which a run that resumes there takes again, and temporary files."""
    metrics = [each for each in read_metrics(out) if each.step <= step]
    files.remove_partials(out)
    if (out / METRICS).exists():
        files.write_atomically(out / METRICS, msgspec.json.Encoder().encode_lines(metrics))


@contextmanager
def open_board(out: Path, step: int) -> Iterator[Callable[[TrainMetrics], None]]:
    """Yields a function that writes metrics after `step` for TensorBoard.

    It does nothing if TensorBoard is not installed, or if this is not the first process.
    """
    if rank() > 0 or find_spec("tensorboard") is None:
        yield lambda metrics: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) as writer:

        def write(metrics: TrainMetrics) -> None:
            for name, value in asdict(metrics).items():
                if value is not None and name != "step":
                    writer.add_scalar(name, value, metrics.step)

        yield write


def problems(out: Path) -> Iterator[str]:
    """Yields a line for each damaged file of the training run in a folder, with the remedy."""
    for check in (_job_store(out).read_spec, partial(check_checkpoint, out), partial(read_metrics, out)):
        try:
            check()
        except (InputError, OSError) as error:
            yield str(error)
