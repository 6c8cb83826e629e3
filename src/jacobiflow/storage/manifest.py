"""What the samples of a folder are: the settings of the run that draws them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from jacobiflow.files import sha256
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance, in_force
from jacobiflow.measuring import machine
from jacobiflow.solvers import Certificate

FORMAT_VERSION = 1
FILES = ("npz", "png")
# What may change where a run is resumed: how many samples, and where it runs. Labels and strategy.json are compared by
# `jacobiflow.storage.begin`, which has both at hand.
_MAY_CHANGE = frozenset({"num", "model", "labels_sha256", "strategy_sha256", "machine", "checksums"})
OTHER_FOLDER = "give another folder, or overwrite=True to replace them"
_LONGEST = 60  # characters of a value that a message quotes


class SampleFolderError(ValueError):
    """A folder of samples that cannot be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What a folder's samples are.

    **Attributes:**

    - `num`: how many samples; `image_shape`: (C, H, W).
    - `seed`; `labels_sha256`: of the labels as little-endian int64, `None` without; `num_classes` of the flow.
    - `batch_size`; `shard_size`, a multiple of it: shard i begins with sample shard_size * i.
    - `files`: "npz" or "png".
    - `model`: the name it was loaded by; `fingerprint` of its weights; `dtype` of its network.
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
            dtype=str(flow.var.dtype).removeprefix("torch."), strategy=strategy, strategy_sha256=None,
            guidance=None if guidance is None else asdict(guidance), denoise=float(denoise), tolerance=tolerance,
            certify=certify, machine=machine(flow.var.device),
        )  # fmt: skip

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Inverse of `to_json`. **Raises** `ValueError` that names an entry which is missing or wrong."""
        if not isinstance(value, dict):
            raise ValueError(f"{_short(value)} is not a JSON object")
        if value.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version is {value.get('format_version')!r}, not {FORMAT_VERSION}")
        entries = {name: entry for name, entry in value.items() if name != "format_version"}
        odd = sorted({entry.name for entry in fields(cls)} ^ set(entries))
        if odd:
            raise ValueError(f"{odd[0]} is {'unknown' if odd[0] in entries else 'missing'}")
        for name in ("image_shape", "checksums"):
            entries[name] = tuple(entries[name]) if isinstance(entries[name], list) else entries[name]
        manifest = cls(**entries)
        manifest._check()
        return manifest

    def to_json(self) -> dict[str, Any]:
        """A JSON value, in the order of the attributes."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def spans(self) -> list[tuple[int, int]]:
        """First sample and one past the last of every shard."""
        return [(start, min(start + self.shard_size, self.num)) for start in range(0, self.num, self.shard_size)]

    def num_in(self, shards: Iterable[int]) -> int:
        """How many samples these shards hold."""
        spans = self.spans()
        return sum(stop - start for start, stop in (spans[index] for index in shards))

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
        positive = {name: _is_int(getattr(self, name), 1) for name in ("num", "batch_size", "shard_size")}
        right = positive | {
            "image_shape": isinstance(self.image_shape, tuple)
            and len(self.image_shape) == 3
            and all(_is_int(size, 1) for size in self.image_shape),
            "seed": _is_int(self.seed, 0),
            "num_classes": _is_int(self.num_classes, 0),
            "files": self.files in FILES,
            "guidance": isinstance(self.guidance, dict | None),
            "denoise": type(self.denoise) in (int, float),
            "machine": isinstance(self.machine, dict),
            "checksums": self.checksums is None
            or (isinstance(self.checksums, tuple) and all(isinstance(sha, str) for sha in self.checksums)),
        }
        for name, is_right in right.items():
            if not is_right:
                raise ValueError(f"{name} is {_short(repr(getattr(self, name)))}")
        if self.checksums is not None and len(self.checksums) != len(self.spans()):
            raise ValueError(f"{len(self.checksums)} checksums of {len(self.spans())} shards")


def labels_sha256(labels: Int[Tensor, " n"] | None) -> str | None:
    """SHA-256 of labels as little-endian int64."""
    return None if labels is None else sha256(labels.cpu().numpy().astype("<i8").tobytes())


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # True is no number


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
