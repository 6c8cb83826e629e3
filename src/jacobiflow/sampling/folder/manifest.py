"""The manifest of a folder of samples, and the records and costs of its shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import Guidance
from jacobiflow.data.grid import PICTURE_CHANNELS
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import CertifyMode, Status
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.sampling.result import Samples
from jacobiflow.utils.checks import format_value
from jacobiflow.utils.files import sha256

Count = Annotated[int, msgspec.Meta(ge=1)]
Files = Literal["npz", "png"]
# Entries that may differ on resume.
_MAY_CHANGE = frozenset({"num", "model", "machine", "checksums", "classes"})
_CHECKSUMS = {
    "context_sha256": "other labels or prompts", "fingerprint": "a model with other weights",
    "strategy_sha256": "another strategy",
}  # fmt: skip
_MAX_SHARDS = 100_000
_MAX_NAME_LENGTH = 60  # Characters of a class's name in the name of a folder.


class SampleFolderError(InputValueError):
    """A folder of samples cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """The settings of the run that draws the samples of a folder.

    Attributes:
        num: Number of samples.
        shape: Shape of a sample: (C, H, W) for images, (T, C) for tokens.
        num_tokens: Number of tokens T.
        context_sha256: Checksum of the labels as little-endian int64, or of a context as float32; None without both.
        shard_size: Samples in a shard. Shard i begins with sample `shard_size * i`.
        model: The name by which the flow was loaded.
        fingerprint: Checksum of the weights.
        dtype: The dtype of the network, or "tf32".
        strategy_sha256: Checksum of strategy.json.
        log_prob: Whether the shards have densities.
        machine: The machine on which the run began, see `jacobiflow.utils.timing.describe_machine`.
        checksums: Checksum of each shard; None until all shards are complete.
        sensitivity: Whether the shards have sensitivities.
        classes: The names of the classes, which the folders of PNGs have; empty without names.
    """

    num: Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLES)]
    shape: tuple[int, ...]
    num_tokens: Count
    seed: int
    context_sha256: str | None
    num_classes: int
    batch_size: Count
    shard_size: Count
    files: Files
    model: str
    fingerprint: str
    dtype: str
    strategy: str
    strategy_sha256: str
    guidance: Guidance | None
    denoise: float
    tolerance: float | None
    certify: CertifyMode
    log_prob: bool
    machine: dict[str, Any]
    checksums: tuple[str, ...] | None = None
    sensitivity: bool = False
    classes: tuple[str, ...] = ()
    kind: Literal["samples"] = "samples"
    format_version: Literal[2] = 2

    def __post_init__(self) -> None:
        if self.classes and len(self.classes) != self.num_classes:
            raise InputValueError(f"classes={format_value(self.classes)}: give {self.num_classes} names, or none")
        if self.num_shards > _MAX_SHARDS:
            message = f"{self.num_shards:,} shards; give a larger one, for at most {_MAX_SHARDS:,}"
            raise InputValueError(message, argument="shard_size", value=self.shard_size)

    @property
    def has_pictures(self) -> bool:
        """True if samples are grey or colour images, which are stored in 8 bits."""
        return len(self.shape) == 3 and self.shape[0] in PICTURE_CHANNELS

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-self.num // self.shard_size)

    def span(self, index: int) -> tuple[int, int]:
        """Returns the index of the first sample of a shard, and one past its last."""
        start = index * self.shard_size
        return start, min(start + self.shard_size, self.num)

    def num_in(self, shards: Iterable[int]) -> int:
        """Returns the number of samples in some shards."""
        return sum(stop - start for start, stop in map(self.span, shards))

    def check_resumes(self, other: Manifest, folder: Path) -> None:
        """Raises SampleFolderError if a run with the settings `other` would draw other samples."""
        remedy = "give another folder, or overwrite it"
        if other.num < self.num:
            raise SampleFolderError(
                f"{folder}: holds a run of {self.num:,} samples, more than {other.num:,}; ask for as many, {remedy}"
            )
        for entry in fields(self):
            have, want = getattr(self, entry.name), getattr(other, entry.name)
            if entry.name in _MAY_CHANGE or have == want:
                continue
            texts = (str(value) if isinstance(value, Guidance) else format_value(value) for value in (have, want))
            what = _CHECKSUMS.get(entry.name, f"{entry.name.replace('_', ' ')} {', not '.join(texts)}")
            raise SampleFolderError(f"{folder}: holds samples of {what}; {remedy}")

    def class_folder(self, label: int) -> str:
        """Returns the name of the folder of a class's PNGs: its number, and its name if it has one."""
        if label < 0:
            return "none"
        number = f"{label:0{len(str(self.num_classes - 1))}}"
        name = re.sub(r"\W+", "-", self.classes[label])[:_MAX_NAME_LENGTH] if self.classes else ""
        return f"{number}-{name}" if name not in ("", number) else number


@dataclass(frozen=True)
class Cost:
    """The cost of drawing samples.

    Attributes:
        num_fallback: Number of samples that some block solved again token by token.
        is_exact: Whether every block of every sample was solved token by token.
        status: Number of samples by their worst `Status`.
        sweeps: Sweeps of each block.
        block_seconds: Seconds of each block.
    """

    seconds: float
    denoise_seconds: float
    network_calls: int
    token_evaluations: int
    num_fallback: int
    is_exact: bool
    status: dict[str, int]
    sweeps: tuple[int, ...]
    block_seconds: tuple[float, ...]

    @classmethod
    def of(cls, samples: Samples) -> Cost:
        """Returns the cost of one run."""
        status = samples.status
        return cls(
            seconds=samples.seconds,
            denoise_seconds=samples.denoise_seconds,
            network_calls=samples.network_calls,
            token_evaluations=samples.token_evaluations,
            num_fallback=int(samples.used_fallback.sum()),
            is_exact=bool(samples.exact.all()),
            status={state.name.lower(): int((status == state).sum()) for state in Status},
            sweeps=tuple(block.sweeps for block in samples.stats),
            block_seconds=tuple(block.seconds for block in samples.stats),
        )

    @classmethod
    def total(cls, costs: Sequence[Cost]) -> Cost:
        """Returns the sum of several costs; seconds add up over processes."""
        return cls(*(_total([getattr(cost, entry.name) for cost in costs]) for entry in fields(cls)))


def _total(values: list[Any]) -> Any:
    """Adds numbers, or the entries of dicts and tuples; for booleans returns whether all are true."""
    first = values[0]
    if isinstance(first, dict):
        return {name: sum(value[name] for value in values) for name in first}
    if isinstance(first, tuple):
        return tuple(map(sum, zip(*values, strict=True)))
    return all(values) if isinstance(first, bool) else sum(values)


@dataclass(frozen=True)
class Record:
    """The record of a shard: number of samples, SHA-256 of its .npz file and PNGs one after another, and cost."""

    num: int
    sha256: str
    cost: Cost


def context_sha256(context: Context) -> str | None:
    """Returns the SHA-256 of labels as little-endian int64, or of another context as float32."""
    values = context.values
    if values is None:
        return None
    array = values.detach().cpu().numpy()
    return sha256(array.astype("<f4" if values.is_floating_point() else "<i8").tobytes())
