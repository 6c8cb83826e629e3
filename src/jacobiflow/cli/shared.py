"""Shared by the commands: options and their values, tables, a progress bar."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import jacobiflow as jf
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.data import Noise
    from jacobiflow.models.flow import Flow
    from jacobiflow.utils.progress import Progress

MOST_AT_ONCE = 65_536  # latents of a batch of so many take 200 MB for images of 28x28
_LONGEST = 300  # characters of a message
# What commands read from a model's folder, and what they write to a folder of their own.
_FILES_IN_FOLDERS = (
    "config.json", "model.safetensors", "README.md", "report.json", "report-*.json", "tuning.json", "tuning-*.json",
    "checkpoint.pt", "metrics.jsonl", "samples*.png", "manifest.json", "strategy.json", "shards", "images",
    "evaluation.json", "bench.*",
)  # fmt: skip
SOURCES = "digits, fashion-512, emoji-256, fashion-mnist, an .npz file, or a folder of images or IDX files."
GUIDANCE = (
    'Weight of classifier-free guidance, or "4,attn_temperature=1.2"; other keys: annealed=false, on=scale, on=shift, '
    "rule=density. 0 is off."
)
_LABELS = "balanced, random, none, numbers such as 0,1,2 (repeated), or a .txt or .npy file with one per image."
_PROMPTS = "A prompt for a STARFlow, or a .txt file with one on each line; repeated."
_ENCODE_TEXT = "What encodes prompts: FILE.py:FUNCTION, or the hub id or folder of a T5 encoder."
_TOLERANCE = "Largest residual |g(x) - x| in any block. Default: 1e-3, or a file's own."

Model = Annotated[str, Option(help="A bundled name, a model folder, or a hub id.")]
Prompts = Annotated[str | None, Option(help=_PROMPTS)]
EncodeText = Annotated[str | None, Option(help=_ENCODE_TEXT)]
Images = Annotated[str, Option(help=SOURCES)]
Labels = Annotated[str, Option(help=_LABELS)]
Seed = Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Device = Annotated[str, Option(help="auto (a CUDA GPU, else the CPU), cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, Option(help="float32, float64, bfloat16, float16, or tf32 on a GPU.")]
ReportFile = Annotated[Path | None, Option(help="A report of calibrate: the guess to start from in each block.")]
Guidance = Annotated[str, Option(help=GUIDANCE)]
Recommended = Annotated[str | None, Option(help=f"{GUIDANCE} Default: as recommended by the model.")]
Unguided = Annotated[bool, Option("--plain", help="No guidance.")]
Tolerance = Annotated[float | None, Option(help=_TOLERANCE)]
ImagesAtATime = Annotated[int, Option(min=1, max=MOST_AT_ONCE, help="Images in the network at a time.")]
Json = Annotated[Path | None, Option(help="Also write the results to this file.")]


def load_model(name: str, device: str, dtype: str, guidance: str = "0") -> Flow:
    """Loads the flow of `--model`, `--device`, `--dtype` and `--guidance`; tf32 is set for the whole process."""
    import torch

    device = pick_device(device)
    if dtype == "tf32":
        if not device.startswith("cuda"):
            raise InputValueError(f"--dtype tf32: only a GPU has it, and --device is {device}; give float32")
        torch.set_float32_matmul_precision("high")
        dtype = "float32"
    return jf.load(name, device, dtype).guided(jf.Guidance.parse(guidance))


def pick_device(name: str) -> str:
    """Returns the device that `--device` names: for "auto" a CUDA GPU if there is one, else the CPU."""
    import torch

    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def image_size(flow: Flow) -> tuple[int, int]:
    """Returns the side and the channels of the flow's images, as `load_images` takes them."""
    channels, size, _ = flow.require_images()
    return size, channels


def resolve_settings(
    flow: Flow, guidance: str | None, denoise: float | None, plain: bool, has_context: bool
) -> tuple[jf.SamplingSettings, str]:
    """Returns the guidance and the denoising to sample with, recommended unless given, and a line about their origin.

    A flow with classes or texts is guided by default only if the samples have some.
    """
    if plain and denoise is not None:
        raise InputValueError("--plain: excludes --guidance and --denoise; leave one of them out")
    recommended = jf.SamplingSettings() if plain else flow.recommended
    value, note = resolve_guidance(flow, guidance, plain, has_context)
    settings = jf.SamplingSettings(value, recommended.denoise if denoise is None else denoise)
    if settings == recommended != jf.SamplingSettings():
        note = " (recommended by the model; --plain turns it off)"
    return settings, f"settings: {settings_text(settings)}{note}"


def resolve_guidance(
    flow: Flow, guidance: str | None, plain: bool, has_context: bool
) -> tuple[jf.Guidance | None, str]:
    """Returns the guidance to sample with, recommended unless given, and why that is not used, or an empty text."""
    if plain and guidance is not None:
        raise InputValueError("--plain: excludes --guidance and --denoise; leave one of them out")
    if plain or guidance is not None:
        return flow.guided(None if guidance is None else jf.Guidance.parse(guidance)).guidance, ""  # 0 is None
    if flow.recommended.guidance and flow.has_conditions and not has_context:
        return None, f"; the recommended guidance needs {'prompts' if flow.reads_text else 'labels'}"
    return flow.recommended.guidance, ""


def guide(flow: Flow, guidance: str | None, plain: bool, has_context: bool) -> tuple[Flow, str]:
    """Returns the view of a flow under the guidance to sample with, and a line about that."""
    value, note = resolve_guidance(flow, guidance, plain, has_context)
    if value is not None and value == flow.recommended.guidance:
        note = " (recommended by the model; --plain turns it off)"
    return flow.guided(value), f"guidance: {value or 'none'}{note}"


def settings_text(settings: jf.SamplingSettings) -> str:
    """Returns the options by which `jacobiflow sample` takes `settings`."""
    guidance = f"--guidance {settings.guidance} " if settings.guidance else ""
    denoise = f"--denoise {settings.denoise:g}" if settings.denoise else ""
    return (guidance + denoise).strip() or "--plain"


def parse_batch_size(text: str | None) -> int | None:
    """Returns the number that `--batch-size` gives; None for "auto", or if it is not given."""
    if text is None or text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) <= MOST_AT_ONCE:
        raise InputValueError(f"--batch-size {text[:40]}: give a whole number from 1 to {MOST_AT_ONCE:,}, or auto")
    return int(text)


def parse_labels(text: str, num: int, flow: Flow, seed: int) -> Tensor | None:
    """Returns the labels of `num` samples that `--labels` gives; `seed` is that of random ones."""
    import torch

    from jacobiflow.data import balanced_labels
    from jacobiflow.models.latents import draw_labels

    if getattr(flow.config, "context_channels", 0):
        raise InputValueError("this flow needs a context of numbers: draw its samples in Python, by jacobiflow.sample")
    if text == "none" or (text in ("balanced", "random") and not flow.config.num_classes):
        return None
    if text == "balanced":
        return balanced_labels(num, flow.config.num_classes)
    if text == "random":
        return draw_labels(num, flow.config.num_classes, seed)
    if text.endswith((".txt", ".npy")):
        return flow.check_labels(_read_labels(Path(text)), num)
    if not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", text):
        raise InputValueError(
            f"--labels {text}: give balanced, random, none, whole numbers with commas between, or a .txt or .npy file"
        )
    numbers = torch.tensor([int(part) for part in text.split(",")])
    flow.check_labels(numbers, len(numbers))  # all of them, also if there are fewer samples
    return numbers[torch.arange(num) % len(numbers)]


def parse_prompts(text: str | None, encoder: str | None, num: int, flow: Flow) -> list[str] | None:
    """Returns the prompts of `num` samples that `--prompts` gives, and sets the flow's text encoder to `encoder`."""
    if text is None and encoder is not None:
        raise InputValueError(f"--encode-text {encoder}: give --prompts, too, or leave it out")
    if text is None:
        return None
    if not flow.reads_text:
        raise InputValueError(f"--prompts {text}: this flow reads no text; leave it out")
    if encoder is None:
        raise InputValueError(f"--prompts {text}: give --encode-text, too: {_ENCODE_TEXT}")
    flow.encode_text = load_encoder(encoder)
    try:
        prompts = Path(text).read_text().splitlines() if text.endswith(".txt") else [text]
    except (OSError, ValueError) as error:
        raise InputValueError(f"--prompts {text}: cannot be read ({error})") from error
    if not prompts:
        raise InputValueError(f"--prompts {text}: is empty; give a prompt on each line")
    return [prompts[i % len(prompts)] for i in range(num)]


def load_encoder(encoder: str) -> Any:
    """Returns the text encoder of `--encode-text`."""
    from jacobiflow.evaluation.features import load_function
    from jacobiflow.models import t5_encoder

    is_function = encoder.rpartition(":")[0].endswith(".py")
    return load_function(encoder, "a T5 encoder") if is_function else t5_encoder(encoder)


def _read_labels(path: Path) -> Any:
    """The whole numbers in a text file, or the array in a file of NumPy."""
    import numpy as np

    try:
        if path.suffix == ".npy":
            return np.load(path).astype(np.int64, casting="safe")  # not uint64, which may be too large
        return np.array([int(word) for word in path.read_text().replace(",", " ").split()], np.int64)
    except (OSError, ValueError, TypeError, EOFError, OverflowError) as error:
        raise InputValueError(f"--labels {path}: cannot be read as whole numbers ({error})") from error


def load_report(path: Path | None, flow: Flow) -> jf.CalibrationReport | None:
    """Returns the report of `--report`, if there is one, after a check that it is of this flow."""
    if path is None:
        return None
    report = jf.CalibrationReport.load(path)
    report.check(flow)
    return report


def training_noise(flow: Flow) -> Noise:
    """Returns the noise of the images that the flow was trained on."""
    from jacobiflow.data import Noise

    std = flow.config.noise_std
    return Noise("gaussian", std) if std else Noise("uniform")


def check_output(
    option: str, path: Path | None, model: str | None, *inputs: str | Path | None,
    outputs: Iterable[Path | None] = (), replaces: str = "",
) -> None:  # fmt: skip
    """Raises ValueError if a file that a command is to write cannot be written, or would replace a file that it uses.

    These are the inputs, files or folders; the files of the model, except those that match the pattern `replaces`; and
    the other outputs of the command, files, or folders with the files that it writes there.
    """
    from jacobiflow.models.checkpoints.folder import bundled

    if path is None:
        return
    place = path.resolve()
    if place.is_dir():
        raise InputValueError(f"{option} {path}: is a folder; give a file")
    for source in map(str, filter(None, inputs)):
        file = bundled().get(source, Path(re.sub(r"(?<=\.py):\w+$", "", source)))  # FILE.py:FUNCTION
        if os.path.exists(file) and place.is_relative_to(file.resolve()):
            raise InputValueError(f"{option} {path}: is in {source}, which this command reads; give another file")
    folders = [] if model is None else [bundled().get(model, Path(model))]
    for other in (each.resolve() for each in (*folders, *outputs) if each is not None):
        inner = place.relative_to(other).parts[:1] if place.is_relative_to(other) else ()
        is_used = any(fnmatch(name, used) for name in inner for used in _FILES_IN_FOLDERS)
        if other.is_relative_to(place) or (is_used and not fnmatch(place.name, replaces)):
            raise InputValueError(f"{option} {path}: this command reads or writes that file itself; give another file")
    nearest = next(parent for parent in place.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputValueError(f"{option} {path}: cannot be written; give a file in another folder")


def tunings_beside(out: Path) -> tuple[Path, Path]:
    """Returns the files of `plan --tune` for a bundled model, one of which it writes."""
    return out.with_name("tuning.json"), out.with_name("tuning-guided.json")


def with_options(message: str, options: Mapping[str, str]) -> str:
    """Returns a message of the library with the names of options in place of those of arguments.

    Example:
        >>> with_options("num=5: give less, or overwrite=True", {"num": "--num", "overwrite": "--overwrite"})
        '--num 5: give less, or --overwrite'
    """

    def name_option(match: re.Match[str]) -> str:
        name, value = match.groups()
        is_argument = name in options and (value is not None or "_" in name)
        return options[name] + (" " if value == "=" else "") if is_argument else match[0]

    return re.sub(r"(?<![\w./-])(\w+)(=True\b|=)?", name_option, message)


def one_line(message: str) -> str:
    """Returns a message in one line; a long one is cut in the middle, as the remedy stands at its end."""
    line, half = " ".join(message.split()), (_LONGEST - len(" ... ")) // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


def show_table(columns: Iterable[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> None:
    """Prints a table. The columns `text` are aligned to the left, and folded if they are too long."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    headings = list(columns)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(headings), padding=0)
    for i, heading in enumerate(headings):
        if i in text:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split())))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def duration(seconds: float) -> str:
    """Returns a duration in the unit that suits it.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class ProgressLines:
    """A `Progress` for logs: each minute, a line on stderr with the work that is done and the time that is left."""

    def __init__(self) -> None:
        self._printed = perf_counter()
        self._starts: dict[str, tuple[int, float]] = {}  # steps and time, by kind of work

    def __call__(self, done: int, total: int, what: str) -> None:
        now = perf_counter()
        first, started = self._starts.setdefault(what, (done, now))
        if done > first and now - self._printed >= 60:
            remaining = duration((now - started) * (total - done) / (done - first))
            print(f"{what}: {done:,} of {total:,}, about {remaining} left", file=sys.stderr)
            self._printed = now


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `Progress` that draws a bar for each kind of work, removed at the end; without a terminal, `ProgressLines`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks = {}

        def progress(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield progress
