"""Folders of samples for tests: runs that need no flow, and what two runs must have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.sampling import BlockStats, Samples
from jacobiflow.storage import Manifest, Processes
from jacobiflow.storage.manifest import labels_sha256
from jacobiflow.storage.run import Run

PLAN = jf.Strategy.uniform(jf.Solver(jf.Window(4)), 1)


def manifest_of(num: int = 10, **changed: Any) -> Manifest:
    """The manifest of a run that needs no flow: 4x4 images in shards of 4, 4 and 2."""
    entries: dict[str, Any] = {
        "image_shape": (1, 4, 4), "seed": 0, "labels_sha256": None, "num_classes": 3, "batch_size": 2,
        "shard_size": 4, "files": "npz", "model": "none", "fingerprint": 64 * "f", "dtype": "float32",
        "strategy": "invented", "strategy_sha256": "", "guidance": None, "denoise": 0.0, "tolerance": None,
        "certify": True, "machine": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    return Manifest(num=num, **{**entries, **changed})


def run(out: Path, num: int = 10, labels: Any = "each", **changed: Any) -> jf.SampleFolder:
    """A run without a flow; `changed` are entries of its manifest, or of `Run`."""
    entries = {name: changed.pop(name) for name in list(changed) if name in Manifest.__dataclass_fields__}
    labels = torch.arange(num) % 3 if isinstance(labels, str) else labels
    manifest = manifest_of(num, **{"labels_sha256": labels_sha256(labels), **entries})
    arguments: dict[str, Any] = {
        "latent_shape": (4, 4), "draw": invented, "plan": lambda: PLAN, "keep_plan": False, "overwrite": False,
        "processes": Processes(), "on_shard": None, "progress": None,
    }  # fmt: skip
    return Run(jf.SampleFolder(out, manifest), labels, **{**arguments, **changed}).complete()


def invented(latents: Tensor, labels: Tensor | None, strategy: jf.Strategy, note: Any) -> Samples:
    """The latents as images. Where the first number is above 1 the sample is lost, where the second is, resolved."""
    images, certificate = latents.reshape(-1, 1, 4, 4).clone(), latents[:, 0, 2].abs()
    lost, resolved = latents[:, 0, 0] > 1, latents[:, 0, 1] > 1
    images[lost], certificate[lost] = torch.nan, torch.inf
    none, status = torch.zeros_like(lost), torch.where(lost, int(jf.Status.NONFINITE), int(jf.Status.CONVERGED))
    stats = BlockStats(5, 7, 70, 0.5, certificate, status, none, resolved)
    note(len(latents), len(latents), "sampling")
    return Samples(images, latents, labels, (stats,), certificate, 1.0, None, 1.5, 0.0)


def pixels_in(folder: jf.SampleFolder) -> Any:
    """Pixels (n, h, w, c) of all samples, as the folder reads them."""
    return torch.cat(list(folder.batches())).permute(0, 2, 3, 1).numpy()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def everything(out: Path) -> dict[str, bytes]:
    """The files in a folder, without its lock."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def facts(out: Path) -> Any:
    """All that two runs of the same samples must share: every file, but not what the shards cost."""
    files = everything(out)
    files.pop("samples.png", None)
    records = {name: json.loads(files.pop(name)) for name in list(files) if name.endswith(".json") and "/" in name}
    for record in records.values():
        del record["cost"]
    return files, records


def times(out: Path) -> dict[str, int]:
    """When the files of the shards that have a record were written."""
    done = [path.stem for path in (out / "shards").glob("*.json")]
    return {p.name: p.stat().st_mtime_ns for p in (out / "shards").glob("*") if p.stem in done}


class Killed(BaseException):
    """The end of a process."""


@contextmanager
def killed(after: int) -> Iterator[None]:
    """So many files get or lose their names; the next one, and all that would be cleaned up, do not."""
    left, rename, unlink = [after], os.replace, Path.unlink

    def count(change: Callable[..., None]) -> Callable[..., None]:
        def counted(*given: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            change(*given, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", count(rename))
        patch.setattr(Path, "unlink", count(unlink))
        yield


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
