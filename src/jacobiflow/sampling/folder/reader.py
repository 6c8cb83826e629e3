"""A folder of samples, which are stored in shards.

manifest.json          the spec of the samples, and the machine on which their run began
strategy.json          the solvers of the blocks
shards/00000.npz       8-bit images `arr_0` (n, height, width, channels), as FID tools read them; or float32 `images`
                       (n, channels, height, width), if they are neither grey nor in colour; or float32 `tokens`
                       (n, T, C); for each sample `labels`, `residual`, `used_fallback`, `nonfinite`, `log_prob` and
                       `sensitivity`
images/3-dress/00000017.png  with PNGs: the class, and the index of the sample
units/NAME.json        the checksums and the outcome of a shard, and the checksum of the strategy
outcome.json           the outcome of all samples, once they are drawn
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.jobs import JobFolderError, JobStore
from jacobiflow.planner import Strategy
from jacobiflow.sampling.folder.spec import KIND, OLDEST, RESULT, STRATEGY, VERSION, SampleSpec
from jacobiflow.sampling.result import Outcome
from jacobiflow.utils import serialization
from jacobiflow.utils.deprecation import renamed_attributes
from jacobiflow.utils.files import json_bytes, sha256

# The dtypes of the arrays in a shard.
_DTYPES = {
    "arr_0": ("uint8",), "images": ("float32",), "tokens": ("float32",), "labels": ("int64", "int32"),
    "residual": ("float32", "float64"), "log_prob": ("float32", "float64"), "sensitivity": ("float32", "float64"),
    "used_fallback": ("bool",), "nonfinite": ("bool",),
}  # fmt: skip
_OPTIONAL = ("labels", "residual", "log_prob", "sensitivity")
_REMEDY = "sample into the folder again with the same settings, which draws what is missing"


@renamed_attributes(certificate="residual", lost="nonfinite", resolved="used_fallback", drawn="num_new")
@dataclass(frozen=True)
class SampleFolder:
    """Samples on disk, as `jacobiflow.sample_to_folder` writes them.

    Attributes:
        path: The folder.
        spec: All that the samples depend on.
        num_new: The number of samples that were missing when `sample_to_folder` was called; 0 for an opened folder.
        seconds: The time until they were drawn, denoising included and planning excluded.
        should_print: Whether this process shall print the outcome: one of those that share the folder.

    Example:
        >>> import tempfile, jacobiflow as jf
        >>> out = tempfile.mkdtemp()
        >>> _ = jf.sample_to_folder(jf.load("digits-maf"), 4, out)
        >>> folder = jf.SampleFolder.open(out)
        >>> folder.images(0).shape, folder.residual().shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    path: Path
    spec: SampleSpec
    num_new: int = 0
    seconds: float = 0.0
    should_print: bool = False

    @classmethod
    def open(cls, path: str | Path) -> SampleFolder:
        """Opens a folder of samples."""
        spec = _store(Path(path)).read_spec() if Path(path).is_dir() else None
        if spec is None:
            raise JobFolderError(f"{path}: no folder of samples; give one that jacobiflow sample wrote")
        return cls(Path(path), serialization.decode(SampleSpec, spec, str(path)))

    @property
    def machine(self) -> dict[str, Any]:
        """The machine on which the run began."""
        return _store(self.path).machine()

    @property
    def is_complete(self) -> bool:
        """True if all samples are drawn. Files may have been removed or damaged since, see `problems`."""
        return _store(self.path).read_result() is not None

    @property
    def num_drawn(self) -> int:
        """The number of samples in finished shards."""
        store, spec = _store(self.path), self.spec
        return sum(len(spec.span(i)) for i in range(spec.num_shards) if store.is_finished(spec.unit(i)))

    def problems(self) -> list[str]:
        """Returns a line for each file that is missing or was changed, or one for a run that is not complete."""
        if not self.is_complete:
            return [
                f"{self.path}: {self.num_drawn:,} of {self.spec.num:,} samples are drawn; wait for the run, or give "
                "the same command again, which draws the others"
            ]
        units = (STRATEGY, *map(self.spec.unit, range(self.spec.num_shards)))
        store = _store(self.path)
        return [
            f"{self.path}: {unit} is missing, or does not match its checksum; {_REMEDY}"
            for unit in units if not store.is_intact(unit)
        ]  # fmt: skip

    def sha256(self) -> str:
        """Returns the checksum of the checksums of all shards."""
        store = _store(self.path)
        return sha256(json_bytes([store.checksums(self.spec.unit(i)) for i in range(self.spec.num_shards)]))

    def images(self, index: int) -> Tensor:
        """Returns the images (n, c, h, w) of a shard, in 8 bits if they are grey or in colour.

        Images with other channels, such as the latents of an autoencoder, are float32 as they were drawn.
        """
        if len(self.spec.shape) != 3:
            raise JobFolderError(f"{self.path}: samples of a flow over tokens; take .tokens({index})")
        if not self.spec.has_pictures:
            return torch.from_numpy(self._array(index, "images", self.spec.shape))
        channels, height, width = self.spec.shape
        pixels = self._array(index, "arr_0", (height, width, channels))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def tokens(self, index: int) -> Float[Tensor, "n t c"]:
        """Returns the tokens of a shard, of a flow over tokens."""
        return torch.from_numpy(self._array(index, "tokens", self.spec.shape))

    def batches(self) -> Iterator[Tensor]:
        """Yields the images of one shard after another."""
        for index in range(self.spec.num_shards):
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

    def outcome(self) -> Outcome:
        """Returns the exactness and cost of all samples, as `Samples.outcome` does."""
        result = _store(self.path).read_result()
        if result is None:
            raise JobFolderError("; ".join(self.problems()))
        return serialization.decode(Outcome, result)

    def strategy(self) -> Strategy:
        """Returns the strategy of the samples, without its prediction."""
        if not _store(self.path).is_intact(STRATEGY):
            raise JobFolderError(f"{self.path / 'strategy.json'}: has changed; restore it, or overwrite the samples")
        return replace(Strategy.load(self.path / "strategy.json"), prediction=None)

    def _array(self, index: int, name: str, shape: tuple[int, ...] = ()) -> Any:
        """Reads an array of a shard, with entries of `shape`; returns None if it is optional and missing."""
        file, shape = self.path / "shards" / f"{index:05}.npz", (len(self.spec.span(index)), *shape)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                array = arrays.get(name)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise JobFolderError(f"{file}: missing or damaged; {_REMEDY}") from error
        is_missing = array is None and name in _OPTIONAL
        if not is_missing and (array is None or array.shape != shape or array.dtype.name not in _DTYPES[name]):
            raise JobFolderError(f"{file}: {name} is not {' or '.join(_DTYPES[name])} of shape {shape}; {_REMEDY}")
        return array

    def _concatenated(self, name: str) -> Tensor | None:
        arrays = [self._array(index, name) for index in range(self.spec.num_shards)]
        return None if any(array is None for array in arrays) else torch.from_numpy(np.concatenate(arrays))


def _store(path: Path) -> JobStore:
    return JobStore(path, KIND, VERSION, RESULT, OLDEST)
