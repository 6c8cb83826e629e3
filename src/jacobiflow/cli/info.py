"""`jacobiflow info`: a model, this machine, and checks of folders."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import one_line
from jacobiflow.errors import InputError, InputValueError, UnsupportedError
from jacobiflow.utils.launch import local_device

if TYPE_CHECKING:
    from jacobiflow.models.flow import Flow

_LIBRARIES = ("zuko", "nflows", "glasflow", "normflows", "pyro-ppl", "sbi")  # The libraries that `accelerate` supports.
_MAX_ROUND_TRIP_ERROR = 1e-3  # Largest change of a latent that is decoded and encoded again.


@dataclass(frozen=True, kw_only=True)
class InfoConfig(options.Config):
    """Show a model and this machine, or check a folder.

    Prints the model's shape, size and recommended settings, how its exact loops run here, and versions. Please attach
    the --json file to bug reports. With --check, each line names a problem and its remedy, and the exit code is 2 if
    there is one. If samples have no problem, it also prints how many are exact and certified. With --memory the weights
    are not loaded.

    Example: jacobiflow info --model digits-p1

    Attributes:
        check: Instead, check all files of a model folder, a sample folder or a training folder.
        memory: Instead, show the memory that sampling takes, and the batches that fit on a GPU or, without one, on
            this machine.
    """

    model: options.Model = "fashion-p2"
    check: Annotated[str | None, options.MODEL] = None
    memory: Annotated[options.Flag, options.MODEL] = False


@dataclass(frozen=True)
class InfoResult:
    """The answer of the command.

    Attributes:
        values: The answer for `--json`.
        lines: The answer to print.
        problems: Problems of a folder.
    """

    values: dict[str, Any]
    lines: Sequence[str]
    problems: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the values."""
        return self.values


def run(config: InfoConfig) -> InfoResult:
    """Describes the model and this machine, measures memory, or checks a folder."""
    if config.check is not None:
        return _check(config.check)
    return _measure_memory(config.model) if config.memory else _describe(config.model)


def _describe(model: str) -> InfoResult:
    from importlib.metadata import distributions

    from jacobiflow.utils import timing

    flow = jf.load(model)
    values = {
        "model": model, "flow": flow.model_type, **asdict(flow.config), "num_tokens": flow.config.num_tokens,
        "token_dim": flow.config.token_dim,
        "recommended": loading.settings_text(flow.recommended),
        "classes": ", ".join(flow.classes) or "without names",
        "parameters": sum(p.numel() for p in flow.parameters()),
    }  # fmt: skip
    libraries = {each.name: each.version for each in distributions() if each.name in _LIBRARIES}
    values |= {"native_loops": _native_loops(flow), **timing.describe_machine(), **libraries}
    if captions := values.pop("captions", ()):  # In place of classes and of a text encoder; last, as a long list.
        del values["classes"], values["text_encoder"]
        values["captions"] = captions
    texts = {name: _join(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return InfoResult(values, [_wrap(f"{name:<18}{text}") for name, text in texts.items()])


def _wrap(line: str) -> str:
    """Breaks a line that is wider than the terminal, as a list of names may be."""
    return textwrap.fill(line, get_terminal_size().columns, subsequent_indent=" " * 18, break_on_hyphens=False)


def _join(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values)) or "none"


def _native_loops(flow: Flow) -> str:
    """Returns the instruction set of the native exact loops, or why they do not take the flow's blocks."""
    from jacobiflow import native

    no_rows = flow.var.new_empty(0, flow.config.num_tokens, flow.config.token_dim)
    try:
        for i in range(flow.config.num_blocks):
            flow.inverse_block(i).sequential_inverse(no_rows, flow.context_kind.example(1)[:0])
    except UnsupportedError as error:
        return f"none: {error}"
    return native.describe()


def _measure_memory(model: str) -> InfoResult:
    """Measures what a model needs in each dtype, without loading its weights."""
    import torch

    from jacobiflow.models.memory import free_memory, memory_needs
    from jacobiflow.models.registry import load_shapes

    flow, device = load_shapes(model), torch.device(local_device("auto"))
    free, guidance = free_memory(device), str(flow.guidance or "none")
    needs = dict[str, dict[str, Any]]()
    for name in ("float32", "bfloat16"):
        each = memory_needs(flow, device, getattr(torch, name))
        batches = (each.max_batch(free, weights) for weights in (each.weights + each.copied, each.offloaded))
        needs[name] = asdict(each) | dict(zip(("batch", "offloaded_batch"), batches, strict=True))
    labels = (
        "weights", "largest block", "copy for the exact loop", "weights, offloaded", "keys and values of a sample",
        "all of a sample", "denoising a sample", "batch", "batch, offloaded",
    )  # fmt: skip
    lines = [f"{free / 2**30:.3g} GiB are free on {device}; guidance: {guidance}; batches are powers of two"]
    lines += [f"{'':<28}{'float32':>12}{'bfloat16':>12}"]
    for label, *sizes in zip(labels, *(each.values() for each in needs.values()), strict=True):
        texts = [str(size) if label.startswith("batch") else _format_bytes(size) for size in sizes]
        lines.append(f"{label:<28}{texts[0]:>12}{texts[1]:>12}")
    return InfoResult({"model": model, "device": str(device), "free": free, "guidance": guidance, **needs}, lines)


def _format_bytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _check(path: str) -> InfoResult:
    from jacobiflow.models.checkpoints.folder import CONFIG, WEIGHTS, list_bundled
    from jacobiflow.training import folder as training
    from jacobiflow.utils.files import MANIFEST, read_object

    folder = list_bundled().get(path, Path(path))
    checks: dict[str, Iterable[str]] = {}
    if any((folder / file).exists() for file in (CONFIG, WEIGHTS)):
        checks["a model"] = _model_problems(folder)
    kind = (read_object(folder / MANIFEST) or {}).get("kind")
    if kind == training.KIND:
        checks["a training run"] = training.problems(folder)
    if kind == "samples":
        checks["samples"] = jf.SampleFolder.open(folder).problems()
    if not checks:
        raise InputValueError(f"{path}: no model, samples or training run; give the folder of one, or a model's name")
    problems = [one_line(problem) for of_kind in checks.values() for problem in of_kind]
    values: dict[str, Any] = {"checked": list(checks), "problems": problems}
    lines = problems or [f"{path}: no problem; checked {' and '.join(checks)}"]
    if "samples" in checks and not problems:
        outcome = jf.SampleFolder.open(folder).outcome()
        values["outcome"] = asdict(outcome)
        lines.append(str(outcome))
    return InfoResult(values, lines, problems)


def _model_problems(folder: Path) -> Iterator[str]:
    """Yields problems of the files, of the reports, and of a round trip through the flow."""
    from jacobiflow.models.latents import draw_latents

    try:
        flow = jf.load(folder)
    except jf.CheckpointError as error:
        yield str(error)
        return
    for file in flow.report_files:
        try:
            jf.CalibrationReport.load(file).check(flow)
        except InputError as error:
            yield str(error)
    z = draw_latents(1, flow.config.num_tokens, flow.config.token_dim, seed=0)
    context = flow.context_kind.example(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The line below reports an overflow.
        x = jf.decode(flow, z, context, strategy="sequential", certify=False)
    change = float((flow.encode(x, context)[0] - z).abs().max())
    if not change <= _MAX_ROUND_TRIP_ERROR:  # NaN also fails.
        yield (
            f"{folder}: a latent that is decoded and encoded again is off by {change:.1e}, more than "
            f"{_MAX_ROUND_TRIP_ERROR:g}; the weights are damaged or badly conditioned: copy the folder again, or train "
            "it further"
        )


def show(config: InfoConfig, result: InfoResult) -> None:
    """Prints the lines."""
    print(*result.lines, sep="\n")
