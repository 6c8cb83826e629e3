"""A folder of samples: what was drawn, in shards, each with its record and its checksum.

manifest.json         what the samples are; written first, and again at the end with the checksum of every shard
strategy.json         how the blocks are solved
shards/00000.npz      8-bit images `arr_0` (n, height, width, channels) and `labels` (n,), as FID tools take them
shards/00000.json     the shard's record: its checksum, certificates and cost; without it the shard does not count
images/3/00000017.png in place of .npz files where PNGs were asked for: class, and index of the sample
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from jacobiflow.checks import check_path
from jacobiflow.files import check_regular, files_sha256, remove_partials, sha256, write_atomically, write_json
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.storage import names
from jacobiflow.storage.image_files import check_npz, check_png, from_npz, from_png, to_npz, to_png
from jacobiflow.storage.manifest import Manifest, SampleFolderError
from jacobiflow.storage.names import MANIFEST, STRATEGY
from jacobiflow.storage.record import Record
from jacobiflow.strategy import Strategy

_AGAIN = "sample into the folder again with the same settings, which draws this shard anew"


@dataclass(frozen=True)
class SampleFolder:
    """Samples on disk, as `jacobiflow.sample_to_folder` writes them; that call itself drew `drawn` of them."""

    path: Path
    manifest: Manifest
    drawn: int = 0

    @classmethod
    def open(cls, path: str | Path) -> SampleFolder:
        """**Raises** `TypeError` if `path` is no path, `SampleFolderError` if it has no manifest that can be read."""
        check_path("path", path)
        path = Path(path)
        file = path / MANIFEST
        try:
            check_regular(file)
            return cls(path, Manifest.from_json(json.loads(file.read_text(encoding="utf-8"))))
        except FileNotFoundError as error:
            raise SampleFolderError(f"{path}: no {MANIFEST} in it; give a folder of samples") from error
        except OSError as error:
            raise SampleFolderError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise SampleFolderError(
                f"{file}: not a manifest of samples ({error}); restore it, or move the folder away"
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
        (start, stop), file = self.manifest.span(index), self._record_file(index)
        try:
            check_regular(file)
            record = Record.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return None
        return record if (record.start, record.num) == (start, stop - start) else None

    def has(self, index: int) -> bool:
        """Whether a shard has a record, which may be of other samples."""
        return self._record_file(index).is_file()

    def records(self) -> list[Record]:
        """Those of all shards. **Raises** `SampleFolderError` where one is missing."""
        found = [self.record(i) for i in range(self.manifest.num_shards)]
        missing = [i for i, record in enumerate(found) if record is None]
        if missing:
            raise SampleFolderError(
                f"{self.path}: {len(missing)} of {len(found)} shards are missing, {self._record_file(missing[0]).name} "
                "for one; sample into it again with the same settings, which draws them"
            )
        return [record for record in found if record is not None]

    def verify(self, index: int) -> bool:
        """Whether a shard is there as its run wrote it: its record, and images that match it and the manifest."""
        return not any(self._damage(index))

    def check(self) -> None:
        """**Raises** `SampleFolderError` where a file is missing, or differs from what the run wrote."""
        self.records()
        for problem in self.problems():
            raise SampleFolderError(problem)

    def problems(self) -> Iterator[str]:
        """What is wrong with strategy.json and the shards, each with its remedy; nothing where all is as written."""
        try:
            if self.manifest.strategy_sha256 is not None:
                self.strategy()
        except ValueError as error:
            yield str(error)
        labels, complete = hashlib.sha256(), self.manifest.labels_sha256 is not None
        for index in range(self.manifest.num_shards):
            yield from (f"{words}; {_AGAIN}" for words in self._damage(index))
            record = self.record(index)
            complete = complete and record is not None and record.labels is not None
            labels.update(np.array(() if record is None else record.labels or (), "<i8").tobytes())
        if complete and labels.hexdigest() != self.manifest.labels_sha256:
            yield f"{self.path / MANIFEST}: its labels are not those of the shards; restore it, or move the folder away"

    def check_flow(self, flow: ImageFlow) -> None:
        """**Raises** `SampleFolderError` where the samples have another shape, or other classes or blocks, than `flow`.

        Whether it has the weights that they were drawn from, their manifest's `fingerprint` tells.
        """
        config, manifest = flow.config, self.manifest
        shape = (config.in_channels, config.image_size, config.image_size)
        blocks = config.num_blocks if manifest.strategy_sha256 is None else len(self.strategy().solvers)
        for what, have, want in (
            ("images of shape", manifest.image_shape, shape),
            ("num_classes", manifest.num_classes, config.num_classes),
            ("a strategy of blocks", blocks, config.num_blocks),
        ):
            if have != want:
                raise SampleFolderError(
                    f"{self.path}: has {what} {have}, the model {want}; give the model of the samples"
                )

    def images(self, index: int) -> UInt8[Tensor, "n c h w"]:
        """The 8-bit images of a shard.

        **Raises** `SampleFolderError` if they have another shape or type, `OSError` if a file is missing or no file.
        """
        record = self._record(index)
        files, shape = self._files(index, record), self._shape
        for path in files:
            check_regular(path)
        try:
            if self.manifest.files == "npz":
                pixels = from_npz(files[0], (record.num, *shape))
            else:
                pixels = np.stack([from_png(path, shape) for path in files])
        except ValueError as error:
            raise SampleFolderError(f"{files[0]}: {error}; {_AGAIN}") from error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def labels(self, index: int) -> Int[Tensor, " n"] | None:
        """The labels of a shard's samples; below 0 where a sample has none."""
        labels = self._record(index).labels
        return None if labels is None else torch.tensor(labels)

    def strategy(self) -> Strategy:
        """How the samples were solved, without the prediction that holds for one machine and batch size only.

        **Raises** `SampleFolderError` where they were not drawn by a strategy, or it has changed.
        """
        return replace(self.planned(), prediction=None)

    def planned(self) -> Strategy:
        """The strategy with its prediction. **Raises** as `strategy` does."""
        file, digest = self.path / STRATEGY, self.manifest.strategy_sha256
        if digest is None:
            raise SampleFolderError(f"{self.path}: drawn by {self.manifest.strategy}, which is not a strategy")
        if not (file.is_file() and files_sha256([file]) == digest):
            raise SampleFolderError(f"{file}: has changed since its run wrote it; restore it, or give overwrite=True")
        return Strategy.load(file)

    def batches(self) -> Iterator[UInt8[Tensor, "n c h w"]]:
        """The images of all shards, one shard at a time."""
        for index in range(self.manifest.num_shards):
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
            write_atomically(path, data, sync=as_npz)  # a thousand PNGs would take seconds; a lost one is drawn again
        write_json(self._record_file(index), record.to_json())
        return record

    def remove(self, index: int) -> None:
        """Remove a shard's record, so that it does not count."""
        self._record_file(index).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all that the run of the manifest wrote, and folders that are empty then.

        The manifest stays where others have put files into these: without it, all would be taken for theirs.
        """
        self.empty()
        if not any((self.path / name).exists() for name in (names.SHARDS, names.IMAGES)):
            (self.path / MANIFEST).unlink(missing_ok=True)

    def empty(self) -> None:
        """Remove the strategy and all shards, records first: without these, a run begins anew."""
        self.sweep()
        for path in sorted(self.named(), key=lambda path: path.suffix != ".json"):
            path.unlink(missing_ok=True)
        (self.path / STRATEGY).unlink(missing_ok=True)
        for folder in reversed(names.places(self.path, self.manifest)[1:]):
            with suppress(OSError):  # it holds something else
                folder.rmdir()

    def named(self) -> Iterator[Path]:
        """The files of shards and images that are there, by the names that a run of this manifest gives them."""
        return names.named(self.path, self.manifest)

    def size(self) -> int:
        """Bytes of its images and records."""
        return sum(path.stat().st_size for path in self.named() if path.is_file())

    def sweep(self) -> None:
        """Remove the partial files that killed processes have left."""
        for place in names.places(self.path, self.manifest):
            remove_partials(place)

    # ------------------------------------------------------------------------------------------------------------------

    def _record_file(self, index: int) -> Path:
        return names.record_file(self.path, index)

    def _files(self, index: int, record: Record) -> list[Path]:
        return names.image_files(self.path, self.manifest, index, record)

    @property
    def _shape(self) -> tuple[int, int, int]:
        channels, height, width = self.manifest.image_shape
        return height, width, channels

    def _damage(self, index: int) -> Iterator[str]:
        """How a shard differs from what its run wrote."""
        file, record, manifest = self._record_file(index), self.record(index), self.manifest
        if record is None:
            yield f"{file}: {'damaged, or of other samples' if self.has(index) else 'missing'}"
            return
        has_labels = record.labels is not None
        if has_labels != (manifest.labels_sha256 is not None) or max(record.labels or (-1,)) >= manifest.num_classes:
            yield f"{file}: its labels are not those of {MANIFEST}"
            return
        files, listed = self._files(index, record), manifest.checksums or ()
        try:
            if {files_sha256(files)} != {record.sha256, *listed[index : index + 1]}:
                yield f"{files[0]}: does not match its checksum"
            elif manifest.files == "npz":
                check_npz(files[0], (record.num, *self._shape))
            else:
                for path in files:
                    check_png(path, self._shape)
        except OSError:
            yield f"{files[0]}: does not match its checksum"
        except ValueError as error:
            yield f"{files[0]}: {error}"

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
