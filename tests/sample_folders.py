"""Folders of samples for tests: runs that need no flow, and what two runs must have in common."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch import Tensor

import jacobiflow as jf
from jacobiflow.storage import Drawn, Manifest, generate
from jacobiflow.storage.record import Record


def manifest_of(num: int = 10, **changed: Any) -> Manifest:
    """The manifest of a run that needs no flow: 4x4 images in shards of 4, 4 and 2."""
    entries: dict[str, Any] = {
        "image_shape": (1, 4, 4), "seed": 0, "labels_sha256": None, "num_classes": 3, "batch_size": 2,
        "shard_size": 4, "files": "npz", "model": "none", "fingerprint": 64 * "f", "dtype": "float32",
        "strategy": "invented", "strategy_sha256": None, "guidance": None, "denoise": 0.0, "tolerance": None,
        "certify": True, "machine": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    return Manifest(num=num, **{**entries, **changed})


def record_of(start: int = 4, num: int = 4, **changed: Any) -> Record:
    record = Record(
        start=start, num=num, sha256=64 * "0", labels=tuple(i % 3 for i in range(start, start + num)),
        certificate=tuple(1e-4 * i for i in range(num)), resolved=(1,), lost=(0,), figures={"seconds": 1.5},
    )  # fmt: skip
    return replace(record, **changed)


def run(out: Path, num: int = 10, labels: bool = True, **changed: Any) -> jf.SampleFolder:
    """A run without a flow; `changed` are entries of its manifest, or arguments of `generate`."""
    arguments = {name: changed.pop(name) for name in list(changed) if name not in Manifest.__dataclass_fields__}
    given = torch.arange(num) % 3 if labels else None
    manifest = manifest_of(num, **{"labels_sha256": digest_of(given), **changed})
    drawing = arguments.pop("drawing", lambda _: invented)
    return generate(jf.SampleFolder(out, manifest), given, drawing, (4, 4), **{"progress": False, **arguments})


def digest_of(labels: Any) -> str | None:
    """SHA-256 of labels as little-endian int64."""
    return (
        None
        if labels is None
        else sha256(b"".join(int(i).to_bytes(8, "little", signed=True) for i in labels)).hexdigest()
    )


def invented(start: int, latents: Tensor, labels: Tensor | None, advance: Callable[[float], None]) -> Drawn:
    """The latents as images. Sample 5 is lost, sample 6 was solved again."""
    index = torch.arange(start, start + len(latents))
    images, certificate = latents.view(-1, 1, 4, 4).clone(), 1e-4 * index
    images[index == 5], certificate[index == 5] = torch.nan, torch.inf
    return Drawn(images, certificate, index == 6, {"first": start})


def pixels_in(folder: jf.SampleFolder) -> Any:
    """Pixels (n, h, w, c) of all samples, as the folder reads them."""
    return torch.cat(list(folder.batches())).permute(0, 2, 3, 1).numpy()


def signed(value: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON, with the checksum of its entries."""
    value = {key: entry for key, entry in value.items() if key != "record_sha256"}
    return value | {"record_sha256": sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


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
    for value in records.values():
        assert value == signed(value)
        del value["figures"], value["record_sha256"]
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


class FolderMachine(RuleBasedStateMachine):
    """A folder `out` with `foreign` files, which must stay; `changed` are our own as they were before an edit."""

    out: Path
    foreign: dict[str, bytes]
    changed: dict[str, bytes]

    def begin(self) -> None:
        """An empty folder."""
        self.out, self.foreign, self.changed = Path(tempfile.mkdtemp()) / "out", {}, {}

    def ours(self) -> dict[str, bytes]:
        return {name: held for name, held in everything(self.out).items() if name not in self.foreign}

    def put(self, name: str) -> None:
        """Write a file that is not ours."""
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        self.foreign[name] = b"mine"
        (self.out / name).write_bytes(b"mine")

    @rule()
    def restore(self) -> None:
        for name, held in self.changed.items():
            (self.out / name).write_bytes(held)
        self.changed = {}
