"""A folder of samples, which are stored in shards.

manifest.json          the settings of the run, and in the end the checksum of every shard
strategy.json          the solvers of the blocks
shards/00000.npz       8-bit images `arr_0` (n, height, width, channels), as FID tools read them; or float32 `images`
                       (n, channels, height, width), if they are neither grey nor in colour; or float32 `tokens`
                       (n, T, C); for each sample `labels`, `residual`, `used_fallback`, `nonfinite`, `log_prob` and
                       `sensitivity`
shards/00000.json      the record of the shard: its checksum and cost. A shard without a record does not count
images/3-dress/00000017.png  with PNGs: the class, and the index of the sample
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.data import quantize
from jacobiflow.distributed.parts import Part, find_parts
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.planner import Strategy
from jacobiflow.sampling.folder.manifest import Cost, Manifest, Record, SampleFolderError, context_sha256
from jacobiflow.sampling.result import Outcome, Samples, npz_bytes, png_bytes
from jacobiflow.utils import serialization
from jacobiflow.utils.files import (
    MANIFEST,
    regular_file,
    remove_partials,
    sha256,
    write_atomically,
    write_json,
)

STRATEGY = "strategy.json"
# The dtypes of the arrays in a shard.
_DTYPES = {
    "arr_0": ("uint8",), "images": ("float32",), "tokens": ("float32",), "labels": ("int64", "int32"),
    "residual": ("float32", "float64"), "log_prob": ("float32", "float64"), "sensitivity": ("float32", "float64"),
    "used_fallback": ("bool",), "nonfinite": ("bool",),
}  # fmt: skip
_OPTIONAL = ("labels", "residual", "log_prob", "sensitivity")
_REMEDY = "sample into the folder again with the same settings, which draws what is missing"


@dataclass(frozen=True)
class SampleFolder:
    """Samples on disk, as `jacobiflow.sample_to_folder` writes them.

    Attributes:
        path: The folder.
        manifest: The settings of its run.
        num_new: The number of samples that this call of `sample_to_folder` drew; 0 for an opened folder.
        seconds: The time in which this call drew them, denoising included and planning excluded.

    Example:
        >>> import tempfile, jacobiflow as jf
        >>> out = tempfile.mkdtemp()
        >>> _ = jf.sample_to_folder(jf.load("digits-maf"), 4, out)
        >>> folder = jf.SampleFolder.open(out)
        >>> folder.images(0).shape, folder.residual().shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    path: Path
    manifest: Manifest
    num_new: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, path: str | Path) -> SampleFolder:
        """Opens a folder of samples."""
        path = Path(path)
        if not path.is_dir():
            raise SampleFolderError(
                f"{path}: no such folder; give one that jacobiflow sample or sample_to_folder wrote"
            )
        try:
            return cls(path, serialization.load(path / MANIFEST, "manifest", partial(serialization.decode, Manifest)))
        except InputError as error:
            raise SampleFolderError(f"{error}; restore it, or give another folder") from error

    def save_manifest(self) -> None:
        """Writes manifest.json."""
        write_json(self.path / MANIFEST, serialization.encode(self.manifest))

    def record(self, index: int) -> Record | None:
        """Returns the record of a shard; None if it is missing, damaged, or of another number of samples."""
        try:
            record = serialization.load(self._record_file(index), "record", partial(serialization.decode, Record))
        except InputError:
            return None
        return record if record.num == self.manifest.num_in([index]) else None

    def records(self) -> list[Record]:
        """Returns the records of all shards."""
        num = self.manifest.num_shards
        records = [record for index in range(num) if (record := self.record(index)) is not None]
        if len(records) < num:
            raise SampleFolderError(f"{self.path}: {num - len(records)} of {num} shards are missing; {_REMEDY}")
        return records

    def verify(self, index: int) -> bool:
        """Tells whether a shard matches its record, and its record the manifest."""
        record, checksums = self.record(index), self.manifest.checksums
        if record is None or (checksums is not None and checksums[index : index + 1] != (record.sha256,)):
            return False
        try:
            return sha256(self._npz_file(index), *self._png_files(index)) == record.sha256
        except (OSError, SampleFolderError):
            return False

    @property
    def is_complete(self) -> bool:
        """True if the run has drawn all samples. Files may have been removed or damaged since, see `problems`."""
        return self.manifest.checksums is not None

    def problems(self) -> list[str]:
        """Returns a line for each file that is missing or was changed, and one for a run that is not complete."""
        problems = []
        try:
            self.strategy()
        except SampleFolderError as error:
            problems.append(str(error))
        missing = self._missing_shards()
        if missing and not self.is_complete:
            problems.append(self._describe_missing(missing))
        for index in range(self.manifest.num_shards):
            if index in missing:
                if self.is_complete:
                    problems.append(f"{self._record_file(index)}: missing or damaged; {_REMEDY}")
            elif not self.verify(index):
                problems.append(f"{self._npz_file(index)}: does not match its checksum; {_REMEDY}")
        labels = None if problems else self._concatenated("labels")
        if labels is not None and context_sha256(Context(labels)) != self.manifest.context_sha256:
            problems.append(f"{self.path / MANIFEST}: context_sha256 is not that of the labels; restore the file")
        return problems

    @property
    def num_drawn(self) -> int:
        """The number of samples in complete shards."""
        return self.manifest.num - self.manifest.num_in(self._missing_shards())

    def _missing_shards(self) -> list[int]:
        return [index for index in range(self.manifest.num_shards) if self.record(index) is None]

    def _describe_missing(self, missing: Sequence[int]) -> str:
        """Describes what is missing in a run that is not complete, and how to go on."""
        count, shards = max((part.count for part in find_parts(self.path)), default=1), range(self.manifest.num_shards)
        unfinished = f"{self.path}: {self.num_drawn:,} of {self.manifest.num:,} samples are drawn"
        if count == 1:
            return f"{unfinished}; wait for the run, or give the same command again, which draws the others"
        parts = [Part(i + 1, count) for i in range(count)]
        names = ", ".join(str(part) for part in parts if set(part.share(shards)) & {*missing})
        return (
            f"{unfinished}, and others of part {names} are not; wait for them, or run them again, or all at once "
            "without --part"
        )

    def images(self, index: int) -> Tensor:
        """Returns the images (n, c, h, w) of a shard, in 8 bits if they are grey or in colour.

        Images with other channels, such as the latents of an autoencoder, are float32 as they were drawn.
        """
        if len(self.manifest.shape) != 3:
            raise SampleFolderError(f"{self.path}: samples of a flow over tokens; take .tokens({index})")
        if not self.manifest.has_pictures:
            return torch.from_numpy(self._array(index, "images", self.manifest.shape))
        channels, height, width = self.manifest.shape
        pixels = self._array(index, "arr_0", (height, width, channels))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def tokens(self, index: int) -> Float[Tensor, "n t c"]:
        """Returns the tokens of a shard, of a flow over tokens."""
        return torch.from_numpy(self._array(index, "tokens", self.manifest.shape))

    def batches(self) -> Iterator[Tensor]:
        """Yields the images of one shard after another."""
        for index in range(self.manifest.num_shards):
            yield self.images(index)

    def labels(self, index: int) -> Int[Tensor, " n"] | None:
        """Returns the labels of a shard, None without labels. A negative label means unconditional."""
        labels = self._array(index, "labels")
        return None if labels is None else torch.from_numpy(labels)

    def residual(self) -> Float[Tensor, " n"] | None:
        """Returns the largest residual of every sample; None if residuals were not measured."""
        return self._concatenated("residual")

    def log_prob(self) -> Float[Tensor, " n"] | None:
        """Returns the log-density of every sample in nats; None if it was not computed."""
        return self._concatenated("log_prob")

    def sensitivity(self) -> Float[Tensor, " n"] | None:
        """Returns the sensitivity of every sample to rounding; None if it was not measured."""
        return self._concatenated("sensitivity")

    def used_fallback(self) -> Bool[Tensor, " n"]:
        """Returns whether each sample was solved again token by token."""
        return self._concatenated("used_fallback")  # type: ignore[return-value]

    def nonfinite(self) -> Bool[Tensor, " n"]:
        """Returns whether the exact inverse of each sample overflows; its picture is black, its tokens are NaN."""
        return self._concatenated("nonfinite")  # type: ignore[return-value]

    def cost(self) -> Cost:
        """Returns the cost of all shards together."""
        return Cost.total([record.cost for record in self.records()])

    def outcome(self) -> Outcome:
        """Returns the outcome of all samples, as `Samples.outcome` does."""
        cost, manifest = self.cost(), self.manifest
        return Outcome.of(
            self.residual(),
            self.sensitivity() if manifest.sensitivity else None,
            num=manifest.num,
            num_nonfinite=cost.status["nonfinite"],
            tolerance=self.strategy().certified_tolerance(manifest.num_tokens),
            is_exact=cost.is_exact,
            num_fallback=cost.num_fallback,
            num_above=cost.status["rounding"],
            dtype=manifest.dtype,
        )

    def strategy(self) -> Strategy:
        """Returns the strategy of the samples, without its prediction."""
        file = self.path / STRATEGY
        if not (file.is_file() and sha256(file) == self.manifest.strategy_sha256):
            raise SampleFolderError(f"{file}: has changed since its run wrote it; restore it, or overwrite the samples")
        return replace(Strategy.load(file), prediction=None)

    def write(self, index: int, samples: Samples) -> None:
        """Writes a shard: its samples, then its record. A picture with a value that is not finite is black."""
        shape = tuple(samples.x.shape[1:])
        if shape != self.manifest.shape:
            raise InputValueError(
                f"samples of shape {shape}, but the flow's config says {self.manifest.shape}, which a folder stores; "
                "draw them with jacobiflow.sample"
            )
        nonfinite = ~torch.isfinite(samples.x).flatten(1).all(dim=1)
        name, stored = "images" if len(shape) == 3 else "tokens", samples.x.float()
        if self.manifest.has_pictures:
            pictures = samples.x.masked_fill(nonfinite.view(-1, 1, 1, 1), -1.0)
            name, stored = "arr_0", quantize(pictures).permute(0, 2, 3, 1)
        context = samples.context
        arrays = {
            name: stored,
            "labels": None if context is None or context.is_floating_point() else context,
            "log_prob": samples.log_prob,
            "residual": samples.residual,
            "sensitivity": samples.sensitivity,
            "used_fallback": samples.used_fallback,
            "nonfinite": nonfinite,
        }
        (self.path / "shards").mkdir(exist_ok=True)
        write_atomically(self._npz_file(index), npz_bytes(arrays))
        pngs = self._png_files(index)
        for file, pixels in zip(pngs, stored.cpu() if pngs else (), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, png_bytes(pixels), sync=False)  # Syncing a thousand files takes seconds.
        record = Record(len(stored), sha256(self._npz_file(index), *pngs), Cost.of(samples))
        write_json(self._record_file(index), serialization.encode(record))

    def check_no_links(self) -> None:
        """Raises SampleFolderError if a subfolder is a link, since files elsewhere would be replaced."""
        for folder in (self.path / "shards", self.path / "images", *self.path.glob("images/*")):
            if folder.is_symlink() and folder.is_dir():
                raise SampleFolderError(
                    f"{folder}: is a link; remove it, or give a link to the whole folder of samples"
                )

    def remove_record(self, index: int) -> None:
        """Removes the record of a shard, so that the shard does not count."""
        self._record_file(index).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all files of the run except the manifest, and records first."""
        shards = range(self.manifest.num_shards)
        pngs = [
            file for file in (*self.path.glob("images/*.png"), *self.path.glob("images/*/*.png"))
            if re.fullmatch("[0-9]{8,9}", file.stem) and int(file.stem) < self.manifest.num
        ]  # fmt: skip
        for file in (*map(self._record_file, shards), *map(self._npz_file, shards), *pngs, self.path / STRATEGY):
            file.unlink(missing_ok=True)
        for folder in (*(self.path / "images").glob("*/"), self.path / "images", self.path / "shards"):
            with suppress(OSError):  # The folder is not empty.
                folder.rmdir()

    def remove_partials(self) -> None:
        """Removes temporary files of killed processes."""
        for folder in (self.path, self.path / "shards", *self.path.glob("images/**/")):
            remove_partials(folder)

    def _record_file(self, index: int) -> Path:
        return self.path / "shards" / f"{index:05}.json"

    def _npz_file(self, index: int) -> Path:
        return self.path / "shards" / f"{index:05}.npz"

    def _png_files(self, index: int) -> list[Path]:
        if self.manifest.files == "npz":
            return []
        names = [f"{i:08}.png" for i in range(*self.manifest.span(index))]
        labels = self.labels(index)
        if labels is None:
            return [self.path / "images" / name for name in names]
        classes = map(self.manifest.class_folder, labels.tolist())
        return [self.path / "images" / folder / name for folder, name in zip(classes, names, strict=True)]

    def _array(self, index: int, name: str, shape: tuple[int, ...] = ()) -> Any:
        """Reads an array of a shard, with entries of `shape`; returns None if it is optional and missing."""
        file, shape = self._npz_file(index), (self.manifest.num_in([index]), *shape)
        try:
            with np.load(regular_file(file), allow_pickle=False) as arrays:
                array = arrays.get(name)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise SampleFolderError(f"{file}: missing or damaged; {_REMEDY}") from error
        is_missing = array is None and name in _OPTIONAL
        if not is_missing and (array is None or array.shape != shape or array.dtype.name not in _DTYPES[name]):
            raise SampleFolderError(f"{file}: {name} is not {' or '.join(_DTYPES[name])} of shape {shape}; {_REMEDY}")
        return array

    def _concatenated(self, name: str) -> Tensor | None:
        arrays = [self._array(index, name) for index in range(self.manifest.num_shards)]
        return None if any(array is None for array in arrays) else torch.from_numpy(np.concatenate(arrays))
