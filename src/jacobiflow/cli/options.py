"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.models.flow import Flow

GROUPS = (
    "Model and samples", "Images", "Training", "Measurements", "Speed and exactness", "Guidance and denoising",
    "Output", "Several processes", "Help",
)  # fmt: skip
"""The groups of options in `--help`, in their order."""

(
    model_option, data_option, training_option, measure_option, speed_option, guidance_option, output_option,
    process_option,
) = (partial(Option, rich_help_panel=group) for group in GROUPS[:-1])  # fmt: skip

MAX_BATCH_SIZE = 65_536  # Latents of such a batch take 200 MB for images of 28x28 pixels.
SOURCES = (
    "a folder of images, with a folder for each class if there are classes; an .npz file; a folder of IDX files; or "
    "digits, fashion-512, emoji-256, fashion-mnist."
)
_GUIDANCE = (
    "Weight of classifier-free guidance, such as 3; 0 is none. Options follow after commas: 4,attn_temperature=1.2; "
    "others are annealed=false, on=scale, on=shift, rule=density."
)
_LABELS = (
    "Classes of the samples: balanced (all in turn), random, none, names or numbers to take in turn, such as cat,dog "
    "or 0,3, or a .txt or .npy file with a number for each sample."
)
_PROMPTS = "For a STARFlow: a text, or a .txt file with a text on each line. They are taken in turn."
_ENCODE_TEXT = "The text encoder: FILE.py:FUNCTION, or the hub id or folder of a T5 encoder."
_TOLERANCE = "Largest residual |g(x) - x| that a sample may have in any block. Default: 1e-3, or that of the strategy."
_PART = "One of N jobs that share the folder without communication: 1/8 is the first of eight. Start all of them."

Model = Annotated[str, model_option(help="Name of a bundled model, a model folder, or an id of the Hugging Face Hub.")]
Prompts = Annotated[str | None, model_option(help=_PROMPTS)]
EncodeText = Annotated[str | None, model_option(help=_ENCODE_TEXT)]
Images = Annotated[str, data_option(help=f"The images: {SOURCES}")]
Labels = Annotated[str, model_option(help=_LABELS)]
Seed = Annotated[int, model_option(min=0, max=2**63 - 1, help="Seed of all random numbers.")]
Device = Annotated[
    str, speed_option(help="cpu, cuda, cuda:1 or mps; auto is a CUDA GPU if there is one, else the CPU.")
]
Dtype = Annotated[str, speed_option(help="float32, float64, bfloat16, float16, or tf32 on a GPU.")]
ReportFile = Annotated[
    Path | None, speed_option(help="A report of calibrate, which says where the iteration of each block starts.")
]
Guidance = Annotated[str, guidance_option(help=_GUIDANCE)]
RecommendedGuidance = Annotated[str | None, guidance_option(help=f"{_GUIDANCE} Default: as recommended by the model.")]
NoGuidance = Annotated[bool, guidance_option("--plain", help="No guidance.")]
Tolerance = Annotated[float | None, speed_option(help=_TOLERANCE)]
Part = Annotated[str | None, process_option(help=_PART, metavar="I/N")]
NetworkBatchSize = Annotated[
    int, speed_option(min=1, max=MAX_BATCH_SIZE, help="Images that go through the network together.")
]
Json = Annotated[Path | None, output_option(help="Also write the results to this file.")]


def parse_batch_size(text: str | None) -> int | None:
    """Returns the number of `--batch-size`; None for "auto" or without the option."""
    if text is None or text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) <= MAX_BATCH_SIZE:
        raise InputValueError(f"--batch-size {text[:40]}: give a whole number from 1 to {MAX_BATCH_SIZE:,}, or auto")
    return int(text)


def parse_labels(text: str, num: int, flow: Flow, seed: int) -> Tensor | None:
    """Returns the labels of `num` samples by `--labels`; `seed` is the seed of random labels."""
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
    numbers = torch.tensor([_parse_class(part.strip(), flow.classes) for part in text.split(",")])
    flow.check_labels(numbers, len(numbers))  # Checks all numbers, even if there are fewer samples.
    return numbers[torch.arange(num) % len(numbers)]


def _parse_class(name: str, classes: Sequence[str]) -> int:
    """Returns the number of a class by its name or its number."""
    from jacobiflow.models.labels import class_number

    if name not in classes and re.fullmatch(r"-?\d{1,9}", name):
        return int(name)
    try:
        return class_number(name, classes)
    except InputValueError as error:
        raise InputValueError(f"{error}; or give balanced, random, none, or a .txt or .npy file") from None


def parse_prompts(text: str | None, encoder: str | None, num: int, flow: Flow) -> list[str] | None:
    """Returns the prompts of `num` samples by `--prompts`, and gives the flow the text encoder of `--encode-text`."""
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
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputValueError(f"--prompts {text}: cannot be read ({reason})") from error
    if not prompts:
        raise InputValueError(f"--prompts {text}: is empty; give a prompt on each line")
    return [prompts[i % len(prompts)] for i in range(num)]


def load_encoder(encoder: str) -> Any:
    """Loads the text encoder of `--encode-text`."""
    from jacobiflow.cli.loading import naming_errors
    from jacobiflow.evaluation.features import load_function
    from jacobiflow.models import t5_encoder

    if not encoder.rpartition(":")[0].endswith(".py"):
        return t5_encoder(encoder)
    return naming_errors(f"--encode-text {encoder}")(load_function(encoder, "a T5 encoder"))


def _read_labels(path: Path) -> Any:
    """Reads whole numbers from a text file or a .npy file."""
    import numpy as np

    try:
        if path.suffix == ".npy":
            return np.load(path).astype(np.int64, casting="safe")  # Refuses uint64, which may be too large.
        return np.array([int(word) for word in path.read_text().replace(",", " ").split()], np.int64)
    except (OSError, ValueError, TypeError, EOFError, OverflowError) as error:
        raise InputValueError(f"--labels {path}: cannot be read as whole numbers ({error})") from error
