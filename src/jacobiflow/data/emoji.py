"""People, faces and hands of Noto Emoji, from the npm package emoji-datasource-google."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jacobiflow.data.dataset import DataError, ImageDataset
from jacobiflow.data.folder import read_image
from jacobiflow.data.idx import Split

EMOJI_CLASSES = ("face", "person", "gesture", "profession", "fantasy", "hand")
EMOJI_FOLDER = Path("node_modules/emoji-datasource-google")
_GROUPS = {"person": 1, "person-gesture": 2, "person-role": 3, "person-fantasy": 4, "hands": 5, "hand-prop": 5}
_PREFIXES = {"face-": 0, "hand-": 5}  # of the groups of faces by expression, and of hands by fingers
_NOT_FACES = "face-costume"  # a ghost, a robot
_TESTED = 26  # of 256: a tenth of the emoji


def emoji(split: Split = "train", folder: str | Path = EMOJI_FOLDER, size: int = 32) -> ImageDataset:
    """Emoji of people, faces and hands in all skin tones, on white, resized to `size` x `size`.

    An emoji and its skin tones are on one side of the split: the test split has those whose name's SHA-256 begins with
    a byte below 26, a tenth of them. The images are Google's Noto Emoji, Apache-2.0; the index of emoji is MIT.

    **Arguments:** `folder` is of the package: `npm install emoji-datasource-google@16.0.0` makes it.

    **Raises** `DataError` where the package or one of its images is missing or broken, or `size` is above 64.
    """
    if split not in ("train", "test"):
        raise DataError(f"split={split!r}: give 'train' or 'test'")
    root = Path(folder)
    found = [
        (root / "img" / "google" / "64" / name, label)
        for entry, label in _labelled(root)
        if _is_tested(entry) == (split == "test")
        for name in _files(entry)
    ]
    if not found:
        raise DataError(f"{root}: no emoji of the {split} split in its index; {_REMEDY}")
    images = torch.stack([read_image(path, size, 3) for path, _ in found])
    return ImageDataset(images, torch.tensor([label for _, label in found]), EMOJI_CLASSES)


_REMEDY = "run npm install emoji-datasource-google@16.0.0 here"


def _labelled(root: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The emoji of the six classes in the order of Unicode's chart, and their labels."""
    index = root / "emoji.json"
    if not os.path.isfile(index):
        raise DataError(f"{index}: no such file; {_REMEDY}")
    try:
        entries = sorted(json.loads(index.read_bytes()), key=lambda entry: (entry["sort_order"], entry["unified"]))
        for entry in entries:
            label = _label(entry["subcategory"])
            if label is not None:
                yield entry, label
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not the index of that package ({error!r}); {_REMEDY}") from error


def _label(group: str) -> int | None:
    if group == _NOT_FACES:
        return None
    return _GROUPS.get(group, next((label for start, label in _PREFIXES.items() if group.startswith(start)), None))


def _is_tested(entry: dict[str, Any]) -> bool:
    return hashlib.sha256(entry["unified"].encode()).digest()[0] < _TESTED


def _files(entry: dict[str, Any]) -> list[str]:
    """The images of an emoji: as it is, and in each skin tone that Google drew."""
    kinds = [entry, *entry.get("skin_variations", {}).values()]
    return [kind["image"] for kind in kinds if kind["has_img_google"]]
