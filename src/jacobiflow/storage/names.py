"""The names of the files of a run: nothing else in its folder is ever written to or removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jacobiflow.storage.manifest import Manifest
from jacobiflow.storage.record import Record

CONTENTS = MANIFEST, STRATEGY, SHARDS, IMAGES = ("manifest.json", "strategy.json", "shards", "images")
SHEET = "samples.png"  # which the command line adds
_NO_CLASS = "none"


def record_file(path: Path, index: int) -> Path:
    """The file of a shard's record."""
    return path / SHARDS / f"{index:05}.json"


def image_files(path: Path, manifest: Manifest, index: int, record: Record) -> list[Path]:
    """The files of a shard's images; PNGs lie in folders by class."""
    if manifest.files == "npz":
        return [path / SHARDS / f"{index:05}.npz"]
    names = [f"{record.start + i:08}.png" for i in range(record.num)]
    if record.labels is None:
        return [path / IMAGES / name for name in names]
    digits = _digits(manifest)
    classes = [f"{label:0{digits}}" if label >= 0 else _NO_CLASS for label in record.labels]
    return [path / IMAGES / label / name for label, name in zip(classes, names, strict=True)]


def class_folders(path: Path, manifest: Manifest) -> list[Path]:
    """The folders of PNGs, of those that are there."""
    if manifest.files == "npz":
        return []
    if manifest.labels_sha256 is None:
        return [path / IMAGES]
    return [
        folder
        for folder in (path / IMAGES).glob("*/")
        if folder.name == _NO_CLASS or _is_index(folder.name, _digits(manifest), manifest.num_classes)
    ]


def places(path: Path, manifest: Manifest) -> list[Path]:
    """The folders that a run writes to, of those that are there."""
    found = (path, path / SHARDS, path / IMAGES, *class_folders(path, manifest))
    return [place for place in dict.fromkeys(found) if place.is_dir()]


def named(path: Path, manifest: Manifest) -> Iterator[Path]:
    """The files of shards and images that are there, by the names that a run gives them."""
    kinds = (".json", ".npz") if manifest.files == "npz" else (".json",)
    for file in (path / SHARDS).glob("*"):
        if file.suffix in kinds and _is_index(file.stem, 5, manifest.num_shards):
            yield file
    for folder in class_folders(path, manifest):
        for file in folder.glob("*.png"):
            if _is_index(file.stem, 8, manifest.num):
                yield file


def _digits(manifest: Manifest) -> int:
    return len(str(manifest.num_classes - 1))


def _is_index(text: str, digits: int, stop: int) -> bool:
    """Whether a name is that of a number below `stop`, with so many digits at least."""
    return re.fullmatch("[0-9]{1,9}", text) is not None and int(text) < stop and text == f"{int(text):0{digits}}"
