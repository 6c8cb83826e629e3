"""Folders of samples for the tests of storage: small flows, runs without a flow, and what must be the same in two runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import make_flow, to_float32
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.storage import Drawn, Manifest, generate
from jacobiflow.storage.record import Record

NUM, SHARD = 10, 4  # shards of 4, 4 and 2 samples
SETTINGS: dict[str, Any] = {"strategy": "jacobi-3", "batch_size": 2, "shard_size": SHARD}


@cache
def small() -> jf.TarFlow:
    """A flow of three classes and 8x8 grey images."""
    return to_float32(make_flow(num_classes=3, noise_std=0.1))


def classes(num: int, flow: jf.TarFlow | None = None) -> Tensor:
    return torch.arange(num) % (small() if flow is None else flow).config.num_classes


def draw(out: Path, num: int = NUM, **changed: Any) -> jf.SampleFolder:
    """Samples of `small`."""
    given = {"labels": classes(num), "progress": False, **SETTINGS, **changed}
    return jf.sample_to_folder(small(), num, out, **given)


def manifest_of(num: int = NUM, **changed: Any) -> Manifest:
    """The manifest of a run that needs no flow; of 4x4 images."""
    entries: dict[str, Any] = {
        "image_shape": (1, 4, 4), "seed": 0, "labels_sha256": None, "num_classes": 3, "batch_size": 2,
        "shard_size": SHARD, "files": "npz", "model": "none", "fingerprint": "f", "dtype": "float32",
        "strategy": "invented", "strategy_sha256": None, "guidance": None, "denoise": 0.0, "tolerance": None,
        "certify": True, "machine": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    return Manifest(num=num, **{**entries, **changed})


def run(out: Path, num: int = NUM, labels: bool = True, **changed: Any) -> jf.SampleFolder:
    """A run without a flow; `changed` are entries of its manifest, or arguments of `generate`."""
    arguments = {name: changed.pop(name) for name in list(changed) if name not in Manifest.__dataclass_fields__}
    given = torch.arange(num) % 3 if labels else None
    digest = None if given is None else hashlib.sha256(given.numpy().astype("<i8").tobytes()).hexdigest()
    manifest = manifest_of(num, **{"labels_sha256": digest, **changed})
    drawing = arguments.pop("drawing", lambda _: invented)
    return generate(jf.SampleFolder(out, manifest), given, drawing, (4, 4), **{"progress": False, **arguments})


def invented(start: int, latents: Tensor, labels: Tensor | None, advance: Callable[[float], None]) -> Drawn:
    """The latents as images. Sample 5 is lost, sample 6 was solved again."""
    index = torch.arange(start, start + len(latents))
    images, certificate = latents.view(-1, 1, 4, 4).clone(), 1e-4 * index
    images[index == 5], certificate[index == 5] = torch.nan, torch.inf
    return Drawn(images, certificate, index == 6, {"first": start})


def pixels_of(num: int = NUM) -> Any:
    """The pixels (n, h, w, c) of `run`'s images."""
    images = draw_latents(num, 4, 4).view(-1, 1, 4, 4)
    images[5:6] = torch.nan
    return eight_bit(images)


def eight_bit(images: Tensor) -> Any:
    """Pixels (n, h, w, c) of images, black where they are lost."""
    pixels = np.nan_to_num(images.float().numpy().transpose(0, 2, 3, 1), nan=-1.0, posinf=-1.0, neginf=-1.0)
    return np.round((pixels.clip(-1, 1) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)


def record_of(start: int = 4, num: int = 4, **changed: Any) -> Record:
    record = Record(
        start=start, num=num, sha256="", labels=tuple(i % 3 for i in range(start, start + num)),
        certificate=tuple(1e-4 * i for i in range(num)), resolved=(2,), lost=(1,), figures={"seconds": 1.5, "sweeps": [3, 4]},
    )  # fmt: skip
    return replace(record, **changed)


def signed(value: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON, with the checksum of its entries."""
    value = {key: entry for key, entry in value.items() if key != "record_sha256"}
    return value | {"record_sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def pictures(out: Path) -> dict[str, bytes]:
    """The files that hold images."""
    paths = [*(out / "shards").rglob("*.npz"), *(out / "images").rglob("*.png")]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(paths)}


def everything(out: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"}


def facts(out: Path) -> Any:
    """All that two runs of the same samples must share: images, records and manifest; not what they cost."""
    records = {path.name: read(path) for path in sorted((out / "shards").glob("*.json"))}
    for value in records.values():
        assert value == signed(value)
        del value["figures"], value["record_sha256"]
    strategy = out / "strategy.json"
    return pictures(out), records, read(out / "manifest.json"), strategy.is_file() and strategy.read_text()


def times(out: Path) -> dict[str, int]:
    """When the files of the shards that have a record were written."""
    done = [path.stem for path in (out / "shards").glob("*.json")]
    return {str(p): p.stat().st_mtime_ns for p in (out / "shards").glob("*") if p.stem in done}


def partials(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".partial")]


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
