"""Options that several commands share, the panels of `--help`, and the parsing of values."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import cyclopts
from cyclopts import Group, Parameter, validators
from cyclopts.validators import Number

from jacobiflow.errors import InputValueError, first_line
from jacobiflow.utils.deprecation import warn_renamed

if TYPE_CHECKING:
    from torch import Tensor

    from jacobiflow.models.flow import Flow
    from jacobiflow.models.starflow import STARFlowConfig
    from jacobiflow.models.text_encoder import EncodeText as TextEncoder

MODEL, DATA, TRAINING, MEASUREMENT, SPEED, GUIDANCE, OUTPUT = (
    Parameter(group=Group(title, sort_key=position))
    for position, title in enumerate((
        "Model and samples", "Images", "Training", "Measurements", "Speed and exactness", "Guidance and denoising",
        "Output",
    ))
)  # fmt: skip
"""The panels of options in `--help`, in their order."""

EXISTING = Parameter(validator=validators.Path(exists=True))
"""For a file or a folder that is read."""

NEGATABLE = Parameter(negative_bool="no-")
"""For a flag that is on by default: `--no-FLAG` turns it off."""

REPEATABLE = Parameter(show_default=lambda values: ", ".join(map(str, values)))
"""For an option with several values, whose defaults the help lists."""

MAX_BATCH_SIZE = 65_536  # Latents of such a batch take 200 MB for images of 28x28 pixels.
_BUNDLED_IMAGES = ("digits", "fashion-512", "emoji-256", "fashion-mnist")
SOURCES = (
    "a folder of images, with a folder for each class if there are classes; an .npz file; a folder of IDX files; or "
    f"{', '.join(_BUNDLED_IMAGES)}."
)
RENAMED = {
    "--channels": "--width", "--clip": "--max-grad-norm", "--drop-label": "--label-dropout", "--ema": "--ema-decay",
    "--mirror": "--horizontal-flip", "--shift": "--translate", "--traced": "--convergence-samples",
}  # fmt: skip
"""New names of options by the old ones, which still work."""

BUNDLED_MODELS = sorted(path.parent.name for path in Path(__file__).parents[1].glob("bundled/*/config.json"))
_MODEL = f"A bundled model ({', '.join(BUNDLED_MODELS)}), a model folder, or an id owner/name of the Hugging Face Hub."
_GUIDANCE = (
    "Weight of classifier-free guidance, such as 3; 0 is none. Options follow after commas: 4,attn_temperature=1.2; "
    "others are annealed=false, on=scale, on=shift, rule=density."
)
_LABELS = (
    "Classes of the samples: balanced (all in turn), random, none, names or numbers to take in turn, such as face,hand "
    "or face hand, or a .txt or .npy file with a number for each sample."
)
_PROMPTS = (
    'Texts, such as "broken heart" thumbsup, or a .txt file with one on each line, to take in turn. Default: '
    "captions of the training, at random, if the model lists them."
)
_DEVICE = "cpu, cuda, cuda:1 or mps; auto is a CUDA GPU if there is one, else the CPU. We never ran it on a GPU."
_REPORT = "A report of calibrate, which says where the iteration of each block starts."
_TOLERANCE = "Largest residual |g(x) - x| that a sample may have in any block. Default: 1e-3, or that of the strategy."
_ENCODE_TEXT = "The text encoder: FILE.py:FUNCTION, or the hub id of a T5 encoder. Default: the model's."


def replace_renamed(words: Sequence[str]) -> list[str]:
    """Returns a command line with the new names of its options; an old name warns."""

    def replace(option: re.Match[str]) -> str:
        if option[0] in RENAMED:
            warn_renamed(option[0], RENAMED[option[0]])
        return RENAMED.get(option[0], option[0])

    return [re.sub("^--[a-z-]+", replace, word) for word in words]


def convert(kind: Any, tokens: Any) -> Any:
    """Converts the values of an option; refuses 3.5 for a whole number, which cyclopts would round."""
    kinds = _parts(kind)
    words = [token.value for token in tokens] if int in kinds and float not in kinds else []
    for word in words:
        if word not in kinds and not re.fullmatch("-?[0-9_]+", word):
            raise ValueError(f"{word} is not a whole number.")
    return cyclopts.convert(kind, tokens)


def _parts(kind: Any) -> set[Any]:
    """Returns a type with the types and values that it is made of."""
    return {kind}.union(*map(_parts, get_args(kind)))


def within(least: int, most: int | None = None) -> Parameter:
    """Returns the check of a number from `least` to `most`."""
    return Parameter(validator=Number(gte=least, lte=most))


def find_extensions() -> Any:
    """Returns the entry points of installed packages that register classes of their own."""
    from importlib.metadata import entry_points  # `--help` does not need it.

    return entry_points(group="jacobiflow")


def near_miss(*names: str) -> Parameter:
    """Returns a check that refuses a misspelled name. An unknown one passes if it may be registered outside."""

    def check(_: Any, values: Any) -> None:
        for value in (values,) if isinstance(values, str) else values or ():
            word = re.split("[^a-z-]", value.strip().lower())[0].rstrip("-")  # "gs-jacobi" in "gs-jacobi:4-2"
            if word in names or not word or value.endswith(".json") or find_extensions():
                continue
            question = suggest(word, names)
            if question or "torch" not in sys.modules:  # A program that has imported it may have registered names.
                raise ValueError(f"{question} Give one of {', '.join(names)}.".strip())

    return Parameter(validator=check)


def _check_model(_: Any, name: str | None) -> None:
    if name is None or name in BUNDLED_MODELS:
        return
    is_folder = Path(name).is_dir()
    if is_folder and not (Path(name) / "config.json").exists():
        raise ValueError(f"No model folder: it has no config.json. Give {_MODEL[0].lower()}{_MODEL[1:]}")
    if not is_folder and "/" not in name and not Path(name).exists():
        raise ValueError(f"No such model.{suggest(name, BUNDLED_MODELS)} Give {_MODEL[0].lower()}{_MODEL[1:]}")


def _check_images(_: Any, source: str | None) -> None:
    if source is not None and source not in _BUNDLED_IMAGES and not Path(source).exists():
        raise ValueError(f"No such images.{suggest(source, _BUNDLED_IMAGES)} Give {SOURCES}")


def suggest(value: str, names: Sequence[str]) -> str:
    """Returns a question after the name that a value is close to, or begins, or ""."""
    close = get_close_matches(value, names, n=1, cutoff=0.7) or [name for name in names if name.startswith(value)]
    return "".join(f' Did you mean "{name}"?' for name in close[:1])


def _check_batch_size(_: Any, size: int | str | None) -> None:
    if isinstance(size, int):
        Number(gte=1, lte=MAX_BATCH_SIZE)(int, size)


IMAGES = Parameter(group=DATA.group, validator=_check_images)
STRATEGY = near_miss("auto", "sequential", "jacobi", "gs-jacobi", "window", "whole", "segments", "original")
Flag = Annotated[bool, Parameter(show_default=False)]
Model = Annotated[str, MODEL, Parameter(validator=_check_model, help=_MODEL)]
Prompts = Annotated[tuple[str, ...], MODEL, Parameter(help=_PROMPTS, consume_multiple=1, show_default=False)]
EncodeText = Annotated[str | None, MODEL, Parameter(help=_ENCODE_TEXT)]
Images = Annotated[str, IMAGES, Parameter(help=f"The images: {SOURCES}")]
Labels = Annotated[tuple[str, ...], MODEL, REPEATABLE, Parameter(help=_LABELS, consume_multiple=1)]
Seed = Annotated[int, MODEL, within(0, 2**63 - 1), Parameter(help="Seed of all random numbers.")]
Device = Annotated[str, SPEED, Parameter(help=_DEVICE)]
Dtype = Annotated[
    Literal["float32", "float64", "bfloat16", "float16", "tf32"],
    SPEED,
    Parameter(help="Precision of the network; tf32 needs a GPU."),
]
ReportFile = Annotated[Path | None, SPEED, EXISTING, Parameter(help=_REPORT)]
Guidance = Annotated[str, GUIDANCE, Parameter(help=_GUIDANCE)]
RecommendedGuidance = Annotated[
    str | None, GUIDANCE, Parameter(help=f"{_GUIDANCE} Default: as recommended by the model.")
]
NoGuidance = Annotated[Flag, GUIDANCE, Parameter(help="No guidance.")]
Tolerance = Annotated[float | None, SPEED, within(0), Parameter(help=_TOLERANCE)]
BatchSize = Annotated[int | Literal["auto"], SPEED, Parameter(validator=_check_batch_size)]
NetworkBatchSize = Annotated[
    int, SPEED, within(1, MAX_BATCH_SIZE), Parameter(help="Samples that go through the network together.")
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of every command.

    Attributes:
        json: Also write the results to this file.
    """

    json: Annotated[Path | None, OUTPUT] = None
    folder_kind: ClassVar[str | None] = None
    """The kind of folder that `--out` is, which no other command writes into."""

    def __init_subclass__(cls) -> None:
        """Joins the lines of each paragraph of the docstring: `--help` is as wide as the terminal."""
        cls.__doc__ = re.sub(r"(?<=\S)\n( {4}| {12,})(?=\S)", " ", cls.__doc__ or "")

    def check_options(self) -> None:
        """Raises InputValueError for options that do not fit together. It runs before PyTorch is imported."""
        from jacobiflow.utils.layout import check_own

        self.check_file("json")
        if self.folder_kind is not None:
            out = vars(self)["out"]
            if out.suffix in (".png", ".jpg", ".npz", ".json"):
                raise InputValueError(f"--out {out}: looks like a file; give a folder, such as {out.with_suffix('')}")
            check_own(out, self.folder_kind, overwrite=vars(self).get("overwrite", False))

    def check_file(self, name: str) -> None:
        """Raises InputValueError if the file of an option cannot be written, or lies where another option points."""
        option, path = f"--{name.replace('_', '-')}", getattr(self, name)
        if path is None:
            return
        for other in (value for key, value in vars(self).items() if key != name):
            is_path = isinstance(other, Path) or (isinstance(other, str) and os.path.exists(other))
            if is_path and path.resolve().is_relative_to(Path(other).resolve()):
                raise InputValueError(f"{option} {path}: is in {other}, which this command uses; give another file")
        nearest = next(parent for parent in path.resolve().parents if parent.exists())
        if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise InputValueError(f"{option} {path}: cannot be written; give a file in a folder that can be")


def parse_labels(words: Sequence[str], num: int, flow: Flow, seed: int) -> Tensor | None:
    """Returns the labels of `num` samples by `--labels`; `seed` is the seed of random labels."""
    import torch

    from jacobiflow.data import balanced_labels
    from jacobiflow.models.contexts import Numbers, Texts, class_number
    from jacobiflow.models.latents import draw_labels

    text = ",".join(words)
    if isinstance(flow.context_kind, Numbers):
        raise InputValueError("this flow needs a context of numbers: draw its samples in Python, by jacobiflow.sample")
    if not flow.config.num_classes and text not in ("balanced", "random", "none"):
        remedy = "give --prompts instead" if isinstance(flow.context_kind, Texts) else "leave it out"
        raise InputValueError(f"this model has no classes; {remedy}", argument="labels", value=text)
    if text == "none" or not flow.config.num_classes:
        return None
    if text == "balanced":
        return balanced_labels(num, flow.config.num_classes)
    if text == "random":
        return draw_labels(num, flow.config.num_classes, seed)
    if text.endswith((".txt", ".npy")):
        return flow.context_kind.resolve(_read_labels(Path(text)), num).values
    names = [name.strip() for name in text.split(",")]
    is_number = [name not in flow.classes and re.fullmatch(r"-?\d{1,9}", name) for name in names]
    labels = [int(name) if is_number[i] else class_number(name, flow.classes) for i, name in enumerate(names)]
    return flow.context_kind.resolve(labels)[torch.arange(num, device="cpu") % len(names)].values


def _read_labels(path: Path) -> Any:
    """Reads whole numbers from a text file or a .npy file."""
    import numpy as np

    try:
        if path.suffix == ".npy":
            return np.load(path).astype(np.int64, casting="safe")  # Refuses uint64, which may be too large.
        return np.array([int(word) for word in path.read_text().replace(",", " ").split()], np.int64)
    except (OSError, ValueError, TypeError, EOFError, OverflowError) as error:
        raise InputValueError(f"--labels {path}: cannot be read as whole numbers ({error})") from error


def parse_prompts(texts: Sequence[str], encoder: str | None, flow: Flow) -> list[str]:
    """Returns the prompts of `--prompts`, for which the flow needs a text encoder."""
    from jacobiflow.models.contexts import Texts

    kind = flow.context_kind
    if not texts and encoder is not None:
        raise InputValueError(f"--encode-text {encoder}: give --prompts, too, or leave it out")
    if not texts:
        return []
    if not isinstance(kind, Texts):
        raise InputValueError(
            f"--prompts {texts[0]}: this flow reads no text; leave it out, or sample a STARFlow, such as emoji-star"
        )
    if kind.encode_text is None:
        raise InputValueError(f"--prompts {texts[0]}: give --encode-text, too: {_ENCODE_TEXT}")
    prompts = list[str]()
    for text in texts:
        try:
            prompts += Path(text).read_text().splitlines() if text.endswith(".txt") else [text]
        except (OSError, ValueError) as error:
            raise InputValueError(f"--prompts {text}: cannot be read ({first_line(error)})") from error
    if not prompts:
        raise InputValueError(f"--prompts {texts[0]}: is empty; give a prompt on each line")
    return prompts


def names_function(encoder: str) -> bool:
    """Returns True if the text encoder of `--encode-text` is FILE.py:FUNCTION."""
    return encoder.rpartition(":")[0].endswith(".py")


def load_encoder(encoder: str, config: STARFlowConfig) -> TextEncoder | None:
    """Loads the text encoder of `--encode-text` for a flow of this config."""
    from jacobiflow.models.text_encoder import t5_encoder
    from jacobiflow.utils.functions import load_function

    if names_function(encoder):
        return load_function(encoder, "a T5 encoder")
    return t5_encoder(encoder, config.text_tokens)
