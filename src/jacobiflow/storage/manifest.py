"""What the samples of a folder are: the settings of the run that draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from jacobiflow.errors import InputValueError
from jacobiflow.files import entries_sha256, sha256
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.precision import precision
from jacobiflow.guidance import Guidance, in_force
from jacobiflow.latents import MOST_SAMPLES
from jacobiflow.measuring import machine
from jacobiflow.solvers import Certificate

FORMAT_VERSION = 1
FILES = ("npz", "png")
CHECKSUM = "manifest_sha256"  # of all other entries; manifests of earlier versions lack it
MOST_SHARDS, MOST_BYTES = 1_000_000, 2**32  # of a folder; of a shard's 8-bit images
# What may change where a run is resumed: how many samples, and where it runs. Labels and strategy.json are compared by
# `jacobiflow.storage.begin`, which has both at hand.
_MAY_CHANGE = frozenset({"num", "model", "labels_sha256", "strategy_sha256", "machine", "checksums"})
OTHER_FOLDER = "give another folder, or overwrite=True to replace them"
_LONGEST = 60  # characters of a value that a message quotes


class SampleFolderError(InputValueError):
    """A folder of samples that cannot be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What a folder's samples are.

    **Attributes:**

    - `num`: how many samples; `image_shape`: (C, H, W).
    - `seed`; `labels_sha256`: of the labels as little-endian int64, `None` without; `num_classes` of the flow.
    - `batch_size`; `shard_size`, a multiple of it: shard i begins with sample shard_size * i.
    - `files`: "npz" or "png".
    - `model`: the name it was loaded by; `fingerprint` of its weights; `dtype` that its network computes in, or tf32.
    - `strategy`: its name; `strategy_sha256`: of strategy.json, `None` where the sampler is not a strategy.
    - `guidance`, `denoise`, `tolerance`, `certify`: as `jacobiflow.sample` takes them, guidance as a JSON object.
    - `machine`: what the run began on; see `jacobiflow.measuring.machine`.
    - `checksums`: SHA-256 of each shard, `None` before all are there.
    """

    num: int
    image_shape: tuple[int, int, int]
    seed: int
    labels_sha256: str | None
    num_classes: int
    batch_size: int
    shard_size: int
    files: Literal["npz", "png"]
    model: str
    fingerprint: str
    dtype: str
    strategy: str
    strategy_sha256: str | None
    guidance: dict[str, Any] | None
    denoise: float
    tolerance: float | None
    certify: Certificate
    machine: dict[str, Any]
    checksums: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, flow: ImageFlow, num: int, labels: Int[Tensor, " n"] | None, seed: int, *, batch_size: int,
        shard_size: int, strategy: str, guidance: Guidance | None, denoise: float, certify: Certificate, model: str,
        tolerance: float | None = None, files: Literal["npz", "png"] = "npz",
    ) -> Manifest:  # fmt: skip
        """The manifest of samples of `flow` that are to be drawn on this machine."""
        config, guidance = flow.config, in_force(guidance)
        return cls(
            num=num, image_shape=(config.in_channels, config.image_size, config.image_size), seed=seed,
            labels_sha256=labels_sha256(labels), num_classes=config.num_classes, batch_size=batch_size,
            shard_size=shard_size, files=files, model=model, fingerprint=fingerprint(flow),
            dtype=precision(flow), strategy=strategy, strategy_sha256=None,
            guidance=None if guidance is None else asdict(guidance), denoise=float(denoise), tolerance=tolerance,
            certify=certify, machine=machine(flow.var.device),
        )  # fmt: skip

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Inverse of `to_json`. **Raises** `ValueError` that names an entry which is missing or wrong."""
        if not isinstance(value, dict):
            raise InputValueError(f"{_short(value)} is not a JSON object")
        if value.get("format_version") != FORMAT_VERSION:
            raise InputValueError(f"format_version is {value.get('format_version')!r}, not {FORMAT_VERSION}")
        entries = {name: entry for name, entry in value.items() if name not in ("format_version", CHECKSUM)}
        odd = sorted({entry.name for entry in fields(cls)} ^ set(entries))
        if odd:
            raise InputValueError(f"{odd[0]} is {'unknown' if odd[0] in entries else 'missing'}")
        for name in ("image_shape", "checksums"):
            entries[name] = tuple(entries[name]) if isinstance(entries[name], list) else entries[name]
        manifest = cls(**entries)
        manifest._check()
        if CHECKSUM in value and value[CHECKSUM] != manifest.to_json()[CHECKSUM]:
            raise InputValueError("does not match its own checksum: an entry was changed")
        return manifest

    def to_json(self) -> dict[str, Any]:
        """A JSON value, in the order of the attributes, with the checksum of all that."""
        entries = {"format_version": FORMAT_VERSION, **asdict(self)}
        return {**entries, CHECKSUM: entries_sha256(entries)}

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return -(-self.num // self.shard_size)

    def span(self, index: int) -> tuple[int, int]:
        """First sample and one past the last of a shard."""
        start = index * self.shard_size
        return start, min(start + self.shard_size, self.num)

    def num_in(self, shards: Iterable[int]) -> int:
        """How many samples these shards hold."""
        return sum(stop - start for start, stop in map(self.span, shards))

    def check_resumes(self, other: Manifest, folder: Path) -> None:
        """**Raises** `SampleFolderError` where a run of `other` would not draw the samples that this one began."""
        for entry in fields(self):
            have, want = getattr(self, entry.name), getattr(other, entry.name)
            if entry.name not in _MAY_CHANGE and have != want:
                raise SampleFolderError(
                    f"{folder}: holds samples of {entry.name} {_short(have)}, not {_short(want)}; {OTHER_FOLDER}"
                )
        if other.num < self.num:
            raise SampleFolderError(
                f"{folder}: holds a run of {self.num:,} samples, more than {other.num:,}; give num={self.num}; or "
                f"{OTHER_FOLDER}"
            )

    def _check(self) -> None:
        """**Raises** `ValueError` for an entry of a wrong type or out of range."""
        sums = self.checksums
        right = {
            **{name: _is_int(getattr(self, name), 1) for name in ("num", "batch_size", "shard_size")},
            **{name: _is_int(getattr(self, name), 0) for name in ("seed", "num_classes")},
            **{name: isinstance(getattr(self, name), str) for name in ("model", "dtype", "strategy")},
            **{name: _is_sha256(getattr(self, name), optional=True) for name in ("labels_sha256", "strategy_sha256")},
            "image_shape": isinstance(self.image_shape, tuple)
            and len(self.image_shape) == 3
            and all(_is_int(size, 1) for size in self.image_shape),
            "files": self.files in FILES,
            "fingerprint": _is_sha256(self.fingerprint),
            "guidance": self.guidance is None or _is_guidance(self.guidance),
            "denoise": _is_number(self.denoise),
            "tolerance": self.tolerance is None or _is_number(self.tolerance),
            "certify": self.certify is True or self.certify is False or self.certify == "always",
            "machine": isinstance(self.machine, dict),
            "checksums": sums is None or (isinstance(sums, tuple) and all(map(_is_sha256, sums))),
        }
        for name, is_right in right.items():
            if not is_right:
                raise InputValueError(f"{name} is {_short(repr(getattr(self, name)))}")
        if self.shard_size % self.batch_size:
            raise InputValueError(f"shard_size is {self.shard_size}, no multiple of batch_size, {self.batch_size}")
        check_sizes(self.num, self.shard_size, self.image_shape)
        if sums is not None and len(sums) != self.num_shards:
            raise InputValueError(f"{len(sums)} checksums of {self.num_shards} shards")


def check_sizes(num: int, shard_size: int, image_shape: tuple[int, int, int]) -> None:
    """**Raises** `ValueError` for more samples or shards than a folder holds, or too large a shard to be read."""
    for have, most, what, give in (
        (num, MOST_SAMPLES, "samples", "fewer"),
        (-(-num // shard_size), MOST_SHARDS, "shards", "a larger shard size"),
        (
            min(num, shard_size) * math.prod(image_shape),
            MOST_BYTES,
            "bytes of images in a shard",
            "a smaller shard size",
        ),
    ):
        if have > most:
            raise InputValueError(f"{have:,} {what}: the limit is {most:,}; give {give}")


def labels_sha256(labels: Int[Tensor, " n"] | None) -> str | None:
    """SHA-256 of labels as little-endian int64."""
    return None if labels is None else sha256(labels.cpu().numpy().astype("<i8").tobytes())


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # True is no number


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_sha256(value: Any, optional: bool = False) -> bool:
    return (optional and value is None) or (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)


def _is_guidance(value: Any) -> bool:
    try:
        return asdict(Guidance(**value)) == value
    except (TypeError, ValueError):
        return False


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
