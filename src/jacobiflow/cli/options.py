"""Options that mean the same in every command, and what they stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
import torch
import typer
from jaxtyping import Int
from torch import Tensor
from typer.core import TyperCommand

from jacobiflow.calibration import Report
from jacobiflow.checks import short
from jacobiflow.data import SOURCES, DataError, ImageDataset, balanced_labels, load_images
from jacobiflow.data.idx import Split
from jacobiflow.errors import InputValueError
from jacobiflow.files import write_json
from jacobiflow.flows.fingerprint import check_fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.registry import load
from jacobiflow.guidance import Guidance
from jacobiflow.latents import MOST_SAMPLES, draw_labels
from jacobiflow.storage import Manifest, SampleFolder

Model = Annotated[str, typer.Option("--model", help="A bundled name, a model folder, or a hub id.")]
Images = Annotated[str, typer.Option("--images", help=f"{', '.join(SOURCES)}, or a folder of images or IDX files.")]
Labels = Annotated[
    str,
    typer.Option(
        "--labels",
        help="balanced, random, none, numbers such as 0,1,2 (repeated), or a .txt or .npy file with one per image.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Fixes all that is drawn at random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="A report of jacobiflow calibrate: where to start in each block, by IGM."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float64, bfloat16, float16, or tf32 on a GPU.")]
GuidanceWeight = Annotated[float, typer.Option("--guidance", help="Weight of classifier-free guidance; 0 is off.")]
GuidanceOn = Annotated[str, typer.Option("--guidance-on", help="Guide both, only the scale, or only the shift.")]
ConstantGuidance = Annotated[
    bool, typer.Option("--constant-guidance", help="The same weight for every token, not rising along them.")
]
AttnTemperature = Annotated[
    float, typer.Option("--attn-temperature", help="Attention temperature of guidance's unconditional row.")
]
SamplesFolder = Annotated[Path | None, typer.Option("--samples", help="A folder that jacobiflow sample wrote.")]
Denoise = Annotated[float, typer.Option("--denoise", help="Rate of one denoising step; 0 is off, 1 the norm.")]
FEATURES = "fashion (fashion-FID, of 28x28 grey images), emoji (emoji-FID, of 32x32 images in colour)"
Features = Annotated[str, typer.Option("--features", help=f"{FEATURES}, or inception (FID).")]
Inception = Annotated[
    Path | None, typer.Option("--inception", help="File of Inception's weights; fetched where it is not given.")
]
RealImages = Annotated[
    str | None,
    typer.Option(
        "--images",
        help=f"Real images to compare with: {', '.join(SOURCES)}, or a folder. Default for fashion-FID "
        "and emoji-FID: the training images of their features, of which statistics are bundled.",
    ),
]
Stats = Annotated[
    Path | None, typer.Option("--stats", help="Statistics of real images to compare with, such as *_fid_stats.pth.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        help="Also write tables, pictures, settings and figures to this file: one HTML page, which needs nothing else.",
    ),
]

BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        help="Images solved together, or auto: as many as fit in free memory. Default: all, at most 64.",
    ),
]
AUTO = "auto"
LABEL_FILES = (".txt", ".npy")

_MOST_AT_ONCE = 65_536  # latents of a batch of so many take 200 MB for images of 28x28
LIMITS = {
    **dict.fromkeys(("num", "final", "paired", "test_images", "shard_size"), MOST_SAMPLES),
    **dict.fromkeys(("batch_size", "traced", "repeats", "image_size"), _MOST_AT_ONCE),
}


class Limited(TyperCommand):
    """A command that refuses numbers above `LIMITS` before it starts."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. **Raises** `ValueError` for a number above its limit."""
        for name, most in LIMITS.items():
            value = ctx.params.get(name)
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, int) and number > most:
                    raise InputValueError(f"{name}={number}: the limit is {most:,}; give less")
        return super().invoke(ctx)


def load_model(name: str, device: str, dtype: str = "float32") -> ImageFlow:
    """The flow that `--model`, `--device` and `--dtype` name; tf32 is set for the whole process."""
    if dtype == "tf32":
        if not device.startswith("cuda"):
            raise InputValueError(f"--dtype tf32: only a GPU has it, and --device is {short(device)}; give float32")
        torch.set_float32_matmul_precision("high")
        dtype = "float32"
    return load(name, device, dtype)


def parse_batch_size(text: str | None) -> int | None:
    """The number that `--batch-size` gives; `None` for "auto", or where it is not given."""
    if text is None or text == AUTO:
        return None
    if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
        raise InputValueError(f"--batch-size {short(text)}: give a positive whole number, or auto")
    if int(text) > LIMITS["batch_size"]:
        raise InputValueError(f"--batch-size {text}: the limit is {LIMITS['batch_size']:,}; give less")
    return int(text)


def print_memory(needed: int | None) -> None:
    """Say how many bytes a batch takes, where that is known."""
    if needed is not None:
        print(f"memory: at most {needed / 1e6:,.1f} MB for a batch, beside the weights")


def open_samples(path: Path, flow: ImageFlow) -> SampleFolder:
    """The samples in a folder, whole and of this flow. **Raises** `ValueError` where they are not."""
    folder = SampleFolder.open(path)
    check_fingerprint(folder.manifest.fingerprint, flow, f"--samples {path}: drawn from", "give that one as --model")
    folder.check()
    return folder


def parse_labels(text: str, num: int, flow: ImageFlow, seed: int) -> Int[Tensor, " n"] | None:
    """Labels for `num` samples: "balanced", "random", "none", numbers such as "3" or "0,1,2", repeated in order, or a
    file of `num` numbers.

    **Raises** `ValueError` for any other text, and for a class that the flow does not have.
    """
    if text == "none" or (text in ("balanced", "random") and not flow.config.num_classes):
        return None
    if text == "balanced":
        return balanced_labels(num, flow.config.num_classes)
    if text == "random":
        return draw_labels(num, flow.config.num_classes, seed)
    if text.endswith(LABEL_FILES):
        labels = _read_labels(Path(text), num)
        flow.check_labels(labels, num)
        return labels
    if not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", text):
        raise InputValueError(
            f"--labels {text}: give balanced, random, none, whole numbers with commas between, or a .txt or .npy file"
        )
    numbers = torch.tensor([int(part) for part in text.split(",")])
    flow.check_labels(numbers, len(numbers))  # all that are named, also where there are fewer samples
    return numbers[torch.arange(num) % len(numbers)]


def _read_labels(path: Path, num: int) -> Int[Tensor, " n"]:
    """The whole numbers in a text file, or in an array of NumPy."""
    try:
        if path.suffix == ".npy":
            labels = np.load(path, mmap_mode="r", allow_pickle=False)  # its shape is checked before it is read
        else:
            labels = np.array([int(word) for word in re.split(r"[\s,]+", path.read_text().strip())])
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputValueError(f"--labels {path}: cannot be read as whole numbers ({reason})") from error
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != (num,):
        have = f"{labels.dtype} of shape {labels.shape}" if isinstance(labels, np.ndarray) else "several arrays"
        raise InputValueError(f"--labels {path}: {have}; give {num:,} whole numbers, one per image")
    if int(labels.max()) > np.iinfo(np.int64).max:
        raise InputValueError(f"--labels {path}: label {labels.max()}; give a class of the model")
    return torch.from_numpy(labels.astype(np.int64))


def parse_guidance(weight: float, on: str, constant: bool, attn_temperature: float) -> Guidance | None:
    """The guidance that the options ask for; `None` where it is off. **Raises** `ValueError` as `Guidance` does."""
    guidance = Guidance(weight, not constant, on, attn_temperature)  # type: ignore[arg-type]
    return guidance if weight else None


def read_images(source: str, size: int, channels: int, split: Split = "train") -> ImageDataset:
    """`jacobiflow.data.load_images` of what `--images` names. **Raises** `ValueError`, which names the option too."""
    try:
        return load_images(source, size, channels, split)
    except DataError as error:
        raise InputValueError(f"--images {source}: {str(error).removeprefix(f'{source}: ')}") from error


def load_report(path: Path, flow: ImageFlow) -> Report:
    """The report in a file. **Raises** `ValueError` where it is none, or of another flow."""
    report = Report.load(path)
    report.check(flow)
    return report


def guidance_words(guidance: Guidance | None) -> list[str]:
    """The options that `parse_guidance` turns into `guidance`, without those that are as by default."""
    if guidance is None:
        return []
    words = ["--guidance", f"{guidance.weight:g}"]
    words += [] if guidance.on == "both" else ["--guidance-on", guidance.on]
    words += [] if guidance.annealed else ["--constant-guidance"]
    return words if guidance.attn_temperature == 1 else [*words, "--attn-temperature", f"{guidance.attn_temperature:g}"]


def sample_words(drawn: Manifest) -> list[str]:
    """The options of `jacobiflow sample` that tell what the samples of a manifest are."""
    guidance = None if drawn.guidance is None else Guidance(**drawn.guidance)
    words = ["--strategy", drawn.strategy, "--seed", str(drawn.seed), *guidance_words(guidance)]
    return [*words, "--denoise", f"{drawn.denoise:g}"]


def report(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures of `--json`, if asked for."""
    if path is not None:
        write_json(path, figures)
