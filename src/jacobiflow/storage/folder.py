"""A folder of samples: what was drawn, in shards, each with its record and its checksum.

manifest.json         what the run is; written first, and again at the end with the checksum of every shard
strategy.json         how its blocks are solved
shards/00000.npz      8-bit images `arr_0` (n, height, width, channels) and `labels` (n,), as FID tools take them
shards/00000.json     the shard's record: its checksum, certificates and cost; without it the shard does not count
images/3/00000017.png instead of .npz files where PNGs were asked for: class, and index of the sample
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jacobiflow.files import finite, sha256, write_atomically, write_json
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance, in_force
from jacobiflow.measuring import machine
from jacobiflow.strategy import Strategy

FORMAT_VERSION = 1
MANIFEST, STRATEGY, SHARDS, IMAGES = "manifest.json", "strategy.json", "shards", "images"
FILES = ("npz", "png")
# What may differ where a run goes on: more samples, and where it runs.
_FREE = frozenset({"num", "model", "labels_sha256", "machine", "checksums"})


class SampleFolderError(ValueError):
    """A folder of samples that is not as it should be; the message names the file and the mend."""


@dataclass(frozen=True)
class Manifest:
    """What a folder's samples are.

    **Attributes:**

    - `num`: how many samples; `image_shape`: (C, H, W).
    - `seed`; `labels_sha256`: of the labels as little-endian int64, `None` without; `num_classes` of the flow.
    - `batch_size`; `shard_size`, a multiple of it: a shard holds samples shard_size * i and on.
    - `files`: "npz" or "png".
    - `model`: the name it was loaded by; `fingerprint` of its weights; `dtype` of its network.
    - `strategy`: its name; `strategy_sha256`: of strategy.json, `None` where the sampler is no strategy.
    - `guidance`, `denoise`, `tolerance`, `certify`: as `jacobiflow.sample` takes them, guidance as a JSON object.
    - `machine`: what it began on; see `jacobiflow.measuring.machine`.
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
    certify: bool
    machine: dict[str, Any]
    checksums: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, flow: ImageFlow, num: int, labels: Int[Tensor, " n"] | None, seed: int, *, batch_size: int,
        shard_size: int, strategy: str, guidance: Guidance | None, denoise: float, certify: bool, model: str,
        tolerance: float | None = None, files: Literal["npz", "png"] = "npz",
    ) -> Manifest:  # fmt: skip
        """The manifest of samples of `flow` that are to be drawn here."""
        config, guidance = flow.config, in_force(guidance)
        return cls(
            num=num, image_shape=(config.in_channels, config.image_size, config.image_size), seed=seed,
            labels_sha256=labels_sha256(labels), num_classes=config.num_classes, batch_size=batch_size,
            shard_size=shard_size, files=files, model=model, fingerprint=fingerprint(flow),
            dtype=str(flow.var.dtype).removeprefix("torch."), strategy=strategy, strategy_sha256=None,
            guidance=None if guidance is None else asdict(guidance), denoise=float(denoise), tolerance=tolerance,
            certify=certify, machine=machine(flow.var.device),
        )  # fmt: skip

    def spans(self) -> list[tuple[int, int]]:
        """First sample and one past the last of every shard."""
        return [(start, min(start + self.shard_size, self.num)) for start in range(0, self.num, self.shard_size)]

    def check(self) -> None:
        """**Raises** `ValueError` where entries are not what they should be."""
        for name in ("num", "batch_size", "shard_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        for name, right in (
            ("image_shape", len(self.image_shape) == 3 and all(type(size) is int for size in self.image_shape)),
            ("seed", type(self.seed) is int),
            ("num_classes", type(self.num_classes) is int and self.num_classes >= 0),
            ("files", self.files in FILES),
            ("guidance", isinstance(self.guidance, dict | None)),
            ("denoise", type(self.denoise) in (int, float)),
            ("machine", isinstance(self.machine, dict)),
            ("checksums", self.checksums is None or all(type(sha) is str for sha in self.checksums)),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        if self.checksums is not None and len(self.checksums) != len(self.spans()):
            raise ValueError(f"{len(self.checksums)} checksums of {len(self.spans())} shards")

    def check_same_run(self, other: Manifest, folder: Path) -> None:
        """**Raises** `SampleFolderError` where `other` would not go on with the samples that this one began."""
        # Where the strategy's file differs because of another setting, that setting is to be named.
        for entry in sorted(fields(self), key=lambda entry: entry.name == "strategy_sha256"):
            have, want = getattr(self, entry.name), getattr(other, entry.name)
            if entry.name not in _FREE and have != want:
                raise SampleFolderError(
                    f"{folder}: holds samples of {entry.name} {_short(have)}, not {_short(want)}; give another --out, "
                    "or --overwrite to lose them"
                )
        if other.num < self.num:
            raise SampleFolderError(
                f"{folder}: holds a run of {self.num:,} samples, more than {other.num:,}; give --num {self.num}, "
                "another --out, or --overwrite to lose them"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Record:
    """A shard's record.

    **Attributes:** `start`, its first sample; `num`; `sha256` of its file, or of its PNGs one after another; `labels`,
    `None` without; `certificate`, the largest residual |g(x) - x| of each sample, `None` where none was asked for;
    `resolved`, the samples that were solved again sequentially, and `lost`, those whose exact inverse overflows (drawn
    black), counted from the shard's first; `figures` of its cost: seconds, network calls and so on.
    """

    start: int
    num: int
    sha256: str
    labels: tuple[int, ...] | None
    certificate: tuple[float, ...] | None
    resolved: tuple[int, ...]
    lost: tuple[int, ...]
    figures: dict[str, Any]


@dataclass(frozen=True)
class SampleFolder:
    """Samples on disk, as `jacobiflow sample` writes them; `drawn` of them by the run that gave this object."""

    path: Path
    manifest: Manifest
    drawn: int = 0

    @classmethod
    def open(cls, path: str | Path) -> SampleFolder:
        """**Raises** `SampleFolderError` where there is no manifest, or it cannot be read."""
        path = Path(path)
        try:
            value = json.loads((path / MANIFEST).read_text())
            if value.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"its format_version is not {FORMAT_VERSION}")
            for name in ("image_shape", "checksums"):
                value[name] = None if value[name] is None else tuple(value[name])
            manifest = Manifest(**value)
            manifest.check()
            return cls(path, manifest)
        except FileNotFoundError as error:
            raise SampleFolderError(
                f"{path}: no {MANIFEST} in it; give a folder that jacobiflow sample wrote"
            ) from error
        except OSError as error:
            raise SampleFolderError(f"{path / MANIFEST}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SampleFolderError(
                f"{path / MANIFEST}: no manifest of samples ({error}); restore it, or draw anew with --overwrite"
            ) from error

    def save_manifest(self) -> None:
        """Write manifest.json, whole or not at all."""
        write_json(self.path / MANIFEST, {"format_version": FORMAT_VERSION, **asdict(self.manifest)})

    def with_checksums(self) -> SampleFolder:
        """The same folder, all of whose shards are there, with their checksums in its manifest."""
        return replace(self, manifest=replace(self.manifest, checksums=tuple(r.sha256 for r in self.records())))

    # ------------------------------------------------------------------------------------------------------- reading

    def record(self, index: int) -> Record | None:
        """The record of a shard; `None` where it is not there, cannot be read, or is of other samples."""
        start, stop = self.manifest.spans()[index]
        try:
            value = json.loads(self._record_file(index).read_text())
            if value.pop("record_sha256") != _record_sha256(value):
                return None
            for name in ("labels", "certificate", "resolved", "lost"):
                value[name] = None if value[name] is None else tuple(value[name])
            if value["certificate"] is not None:  # JSON has no infinity
                value["certificate"] = tuple(torch.inf if v is None else v for v in value["certificate"])
            record = Record(**value)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return record if (record.start, record.num) == (start, stop - start) else None

    def has(self, index: int) -> bool:
        """Whether a shard has a record, which may yet be of other samples."""
        return self._record_file(index).is_file()

    def records(self) -> list[Record]:
        """Those of all shards. **Raises** `SampleFolderError` where one is missing."""
        found = [self.record(i) for i in range(len(self.manifest.spans()))]
        missing = [i for i, record in enumerate(found) if record is None]
        if missing:
            raise SampleFolderError(
                f"{self.path}: {len(missing)} of {len(found)} shards are missing, {self._record_file(missing[0]).name} "
                "for one; give the same jacobiflow sample again, and it draws them"
            )
        return [record for record in found if record is not None]

    def verify(self, index: int) -> bool:
        """Whether a shard is there, with the checksum of its record."""
        record = self.record(index)
        try:
            return record is not None and record.sha256 == sha256(*(path.read_bytes() for path in self._files(index)))
        except OSError:
            return False

    def check(self) -> None:
        """**Raises** `SampleFolderError` where a shard is missing, or not the one whose checksum was taken."""
        records = self.records()
        for index, record in enumerate(records):
            listed = self.manifest.checksums is None or self.manifest.checksums[index] == record.sha256
            if not listed or not self.verify(index):
                raise SampleFolderError(
                    f"{self._files(index)[0]}: does not match its checksum; give the same jacobiflow sample again, "
                    "and it draws this shard anew"
                )

    def images(self, index: int) -> UInt8[Tensor, "n c h w"]:
        """The 8-bit images of a shard."""
        files = self._files(index)
        if self.manifest.files == "npz":
            with np.load(files[0], allow_pickle=False) as arrays:
                pixels = arrays["arr_0"]
        else:
            pixels = np.stack([_read_png(path) for path in files])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def labels(self, index: int) -> Int[Tensor, " n"] | None:
        """The labels of a shard's samples; below 0 where one has none."""
        labels = self._labels(index)
        return None if labels is None else torch.tensor(labels)

    def strategy(self) -> Strategy:
        """How the samples were solved, anywhere and in any batch size. **Raises** `ValueError` where it is not kept."""
        if self.manifest.strategy_sha256 is None:
            text = f"{self.path}: drawn by {self.manifest.strategy}, which is no strategy"
            raise SampleFolderError(f"{text}; give --paired 0")
        return replace(Strategy.load(self.path / STRATEGY), prediction=None)

    def batches(self) -> Iterator[UInt8[Tensor, "n c h w"]]:
        """The images of all shards, one shard at a time."""
        for index in range(len(self.manifest.spans())):
            yield self.images(index)

    def certificate(self) -> Float[Tensor, " n"] | None:
        """The certificate of every sample; `None` where they were drawn without."""
        found = [record.certificate for record in self.records()]
        return torch.tensor([v for part in found if part is not None for v in part]) if all(found) else None

    def resolved(self) -> Bool[Tensor, " n"]:
        """Which samples were solved again sequentially."""
        return self._marks([record.resolved for record in self.records()])

    def lost(self) -> Bool[Tensor, " n"]:
        """Which samples are black because their exact inverse overflows."""
        return self._marks([record.lost for record in self.records()])

    def _marks(self, marked: Sequence[tuple[int, ...]]) -> Tensor:
        marks = torch.zeros(self.manifest.num, dtype=torch.bool)
        for (start, _), indices in zip(self.manifest.spans(), marked, strict=True):
            marks[[start + i for i in indices]] = True
        return marks

    # ------------------------------------------------------------------------------------------------------- writing

    def write(self, index: int, images: UInt8[Tensor, "n c h w"], record: Record) -> Record:
        """Write a shard: its images, then its record with their checksum. **Raises** `OSError` where it cannot."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        contents = [_npz(pixels, record.labels)] if self.manifest.files == "npz" else [_png(image) for image in pixels]
        self._record_file(index).parent.mkdir(parents=True, exist_ok=True)
        for path, data in zip(self._files(index, record), contents, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        record = replace(record, sha256=sha256(*contents))
        value = json.loads(json.dumps(finite(asdict(record))))
        write_json(self._record_file(index), value | {"record_sha256": _record_sha256(value)})
        return record

    def remove(self, index: int) -> None:
        """Take a shard's record away, so that it does not count."""
        self._record_file(index).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all that a run wrote into the folder."""
        for name in (MANIFEST, STRATEGY):
            (self.path / name).unlink(missing_ok=True)
        for name in (SHARDS, IMAGES):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def size(self) -> int:
        """Bytes of its images and records."""
        return sum(f.stat().st_size for name in (SHARDS, IMAGES) for f in (self.path / name).rglob("*") if f.is_file())

    def sweep(self) -> None:
        """Remove what killed processes have left half written."""
        for place in (self.path, self.path / SHARDS, self.path / IMAGES, *(self.path / IMAGES).glob("*/")):
            for half in place.glob(".*.partial"):
                half.unlink(missing_ok=True)

    def _record_file(self, index: int) -> Path:
        return self.path / SHARDS / f"{index:05}.json"

    def _files(self, index: int, record: Record | None = None) -> list[Path]:
        """The files of a shard's images; PNGs lie in folders by class."""
        if self.manifest.files == "npz":
            return [self.path / SHARDS / f"{index:05}.npz"]
        start, stop = self.manifest.spans()[index]
        labels = self._labels(index) if record is None else record.labels
        if labels is None:
            return [self.path / IMAGES / f"{i:08}.png" for i in range(start, stop)]
        digits = len(str(self.manifest.num_classes - 1))
        names = [f"{label:0{digits}}" if label >= 0 else "none" for label in labels]
        return [self.path / IMAGES / name / f"{start + i:08}.png" for i, name in enumerate(names)]

    def _labels(self, index: int) -> tuple[int, ...] | None:
        record = self.record(index)
        if record is None:
            raise SampleFolderError(f"{self._record_file(index)}: missing; give the same jacobiflow sample again")
        return record.labels


def labels_sha256(labels: Int[Tensor, " n"] | None) -> str | None:
    """SHA-256 of labels as little-endian int64."""
    return None if labels is None else sha256(labels.cpu().numpy().astype("<i8").tobytes())


def _record_sha256(value: dict[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def _npz(pixels: NDArray[np.uint8], labels: Sequence[int] | None) -> bytes:
    """The bytes of an .npz file, the same for the same arrays: not compressed, without times."""
    data = io.BytesIO()
    arrays: dict[str, Any] = {"arr_0": pixels} | ({} if labels is None else {"labels": np.array(labels, np.int64)})
    np.savez(data, **arrays)
    return data.getvalue()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(data, "png")
    return data.getvalue()


def _read_png(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
