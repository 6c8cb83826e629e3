"""A folder of samples: what was drawn, in shards, each with its record and its checksum.

manifest.json         what the samples are; written first, and again at the end with the checksum of every shard
strategy.json         how the blocks are solved
shards/00000.npz      8-bit images `arr_0` (n, height, width, channels) and `labels` (n,), as FID tools take them
shards/00000.json     the shard's record: its checksum, certificates and cost; without it the shard does not count
images/3/00000017.png in place of .npz files where PNGs were asked for: class, and index of the sample
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from jacobiflow.files import remove_partials, sha256, write_atomically, write_json
from jacobiflow.storage.image_files import from_npz, from_png, to_npz, to_png
from jacobiflow.storage.manifest import Manifest, SampleFolderError
from jacobiflow.storage.record import Record
from jacobiflow.strategy import Strategy

CONTENTS = MANIFEST, STRATEGY, SHARDS, IMAGES = ("manifest.json", "strategy.json", "shards", "images")


@dataclass(frozen=True)
class SampleFolder:
    """Samples on disk, as `jacobiflow.sample_to_folder` writes them; that call itself drew `drawn` of them."""

    path: Path
    manifest: Manifest
    drawn: int = 0

    @classmethod
    def open(cls, path: str | Path) -> SampleFolder:
        """**Raises** `SampleFolderError` where there is no manifest, or it cannot be read."""
        path = Path(path)
        file = path / MANIFEST
        try:
            return cls(path, Manifest.from_json(json.loads(file.read_text())))
        except FileNotFoundError as error:
            raise SampleFolderError(f"{path}: no {MANIFEST} in it; give a folder of samples") from error
        except OSError as error:
            raise SampleFolderError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise SampleFolderError(
                f"{file}: not a manifest of samples ({error}); restore it, or draw anew with overwrite=True"
            ) from error

    def save_manifest(self) -> None:
        """Write manifest.json, whole or not at all."""
        write_json(self.path / MANIFEST, self.manifest.to_json())

    def with_checksums(self) -> SampleFolder:
        """The same folder, all of whose shards are there, with their checksums in its manifest."""
        return replace(self, manifest=replace(self.manifest, checksums=tuple(r.sha256 for r in self.records())))

    # ------------------------------------------------------------------------------------------------------- reading

    def record(self, index: int) -> Record | None:
        """The record of a shard; `None` where it is not there, cannot be read, or is of other samples."""
        start, stop = self.manifest.spans()[index]
        try:
            record = Record.from_json(json.loads(self._record_file(index).read_text()))
        except (OSError, ValueError, RecursionError):
            return None
        return record if (record.start, record.num) == (start, stop - start) else None

    def has(self, index: int) -> bool:
        """Whether a shard has a record, which may be of other samples."""
        return self._record_file(index).is_file()

    def records(self) -> list[Record]:
        """Those of all shards. **Raises** `SampleFolderError` where one is missing."""
        found = [self.record(i) for i in range(len(self.manifest.spans()))]
        missing = [i for i, record in enumerate(found) if record is None]
        if missing:
            raise SampleFolderError(
                f"{self.path}: {len(missing)} of {len(found)} shards are missing, {self._record_file(missing[0]).name} "
                "for one; sample into it again with the same settings, which draws them"
            )
        return [record for record in found if record is not None]

    def verify(self, index: int) -> bool:
        """Whether a shard is there, with the checksum of its record."""
        record = self.record(index)
        try:
            return record is not None and record.sha256 == sha256(
                *(path.read_bytes() for path in self._files(index, record))
            )
        except OSError:
            return False

    def check(self) -> None:
        """**Raises** `SampleFolderError` where a shard is missing, or differs from its checksum."""
        records = self.records()
        for index, record in enumerate(records):
            listed = self.manifest.checksums is None or self.manifest.checksums[index] == record.sha256
            if not listed or not self.verify(index):
                raise SampleFolderError(
                    f"{self._files(index, record)[0]}: does not match its checksum; sample into the folder again with "
                    "the same settings, which draws this shard anew"
                )

    def images(self, index: int) -> UInt8[Tensor, "n c h w"]:
        """The 8-bit images of a shard."""
        files = self._files(index, self._record(index))
        pixels = from_npz(files[0]) if self.manifest.files == "npz" else np.stack([from_png(path) for path in files])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def labels(self, index: int) -> Int[Tensor, " n"] | None:
        """The labels of a shard's samples; below 0 where a sample has none."""
        labels = self._record(index).labels
        return None if labels is None else torch.tensor(labels)

    def strategy(self) -> Strategy:
        """How the samples were solved, without the prediction that holds for one machine and batch size only.

        **Raises** `SampleFolderError` where they were not drawn by a strategy.
        """
        if self.manifest.strategy_sha256 is None:
            raise SampleFolderError(f"{self.path}: drawn by {self.manifest.strategy}, which is not a strategy")
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
        return self._marks(lambda record: record.resolved)

    def lost(self) -> Bool[Tensor, " n"]:
        """Which samples are black because their exact inverse overflows."""
        return self._marks(lambda record: record.lost)

    # ------------------------------------------------------------------------------------------------------- writing

    def write(self, index: int, images: UInt8[Tensor, "n c h w"], record: Record) -> Record:
        """Write a shard: its images, then its record with their checksum. **Raises** `OSError` where it cannot."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        as_npz = self.manifest.files == "npz"
        contents = [to_npz(pixels, record.labels)] if as_npz else [to_png(image) for image in pixels]
        record = replace(record, sha256=sha256(*contents))
        paths = self._files(index, record)
        for folder in {path.parent for path in (*paths, self._record_file(index))}:
            folder.mkdir(parents=True, exist_ok=True)
        for path, data in zip(paths, contents, strict=True):
            write_atomically(path, data)
        write_json(self._record_file(index), record.to_json())
        return record

    def remove(self, index: int) -> None:
        """Remove a shard's record, so that it does not count."""
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
        """Remove the partial files that killed processes have left."""
        for place in (self.path, self.path / SHARDS, self.path / IMAGES, *(self.path / IMAGES).glob("*/")):
            remove_partials(place)

    # ------------------------------------------------------------------------------------------------------------------

    def _record_file(self, index: int) -> Path:
        return self.path / SHARDS / f"{index:05}.json"

    def _files(self, index: int, record: Record) -> list[Path]:
        """The files of a shard's images; PNGs lie in folders by class."""
        if self.manifest.files == "npz":
            return [self.path / SHARDS / f"{index:05}.npz"]
        names = [f"{record.start + i:08}.png" for i in range(record.num)]
        if record.labels is None:
            return [self.path / IMAGES / name for name in names]
        digits = len(str(self.manifest.num_classes - 1))
        classes = [f"{label:0{digits}}" if label >= 0 else "none" for label in record.labels]
        return [self.path / IMAGES / label / name for label, name in zip(classes, names, strict=True)]

    def _record(self, index: int) -> Record:
        record = self.record(index)
        if record is None:
            raise SampleFolderError(
                f"{self._record_file(index)}: missing; sample into the folder again with the same settings"
            )
        return record

    def _marks(self, marked: Callable[[Record], tuple[int, ...]]) -> Bool[Tensor, " n"]:
        marks = torch.zeros(self.manifest.num, dtype=torch.bool)
        for record in self.records():
            marks[[record.start + i for i in marked(record)]] = True
        return marks
