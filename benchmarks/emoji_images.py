"""People, faces and hands of Noto Emoji, from the npm package emoji-datasource-google that `make emoji` fetches.

The images are Google's Noto Emoji, Apache-2.0; the index of emoji is MIT.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch

from jacobiflow.data import ImageDataset, Split
from jacobiflow.data.folder import read_image

PACKAGE = Path("node_modules/emoji-datasource-google")
CLASSES = ("face", "person", "gesture", "profession", "fantasy", "hand")
_GROUPS = {"person": 1, "person-gesture": 2, "person-role": 3, "person-fantasy": 4, "hands": 5, "hand-prop": 5}
_PREFIXES = {"face-": 0, "hand-": 5}  # of the groups of faces by expression, and of hands by fingers
_NOT_FACES = "face-costume"  # a ghost, a robot
_TESTED = 26  # of 256: a tenth of the emoji


class Emoji(NamedTuple):
    """An entry of the package's index: its code points, category, group, and images, one for each skin tone."""

    code: str
    category: str
    group: str
    images: tuple[Path, ...]

    @property
    def label(self) -> int | None:
        """Its class among `CLASSES`, if any."""
        if self.group == _NOT_FACES:
            return None
        by_prefix = (label for start, label in _PREFIXES.items() if self.group.startswith(start))
        return _GROUPS.get(self.group, next(by_prefix, None))

    @property
    def in_test_split(self) -> bool:
        """True if the emoji and its skin tones belong to the test split."""
        return hashlib.sha256(self.code.encode()).digest()[0] < _TESTED


def read_index(package: Path = PACKAGE) -> list[Emoji]:
    """All emoji of the package in the order of Unicode's chart."""
    images, index = package / "img" / "google" / "64", []
    entries = json.loads((package / "emoji.json").read_bytes())
    for entry in sorted(entries, key=lambda entry: (entry["sort_order"], entry["unified"])):
        tones = [entry, *entry.get("skin_variations", {}).values()]
        files = tuple(images / tone["image"] for tone in tones if tone["has_img_google"])
        index.append(Emoji(entry["unified"], entry["category"], entry["subcategory"], files))
    return index


def emoji(split: Split = "train", package: Path = PACKAGE, size: int = 32) -> ImageDataset:
    """Emoji of people, faces and hands in all skin tones, on white, resized to `size` x `size`.

    An emoji and its skin tones are on one side of the split: the test split has those whose code points, as the index
    writes them, have a SHA-256 that begins with a byte below 26, a tenth of them.
    """
    members = [
        (path, entry.label)
        for entry in read_index(package)
        if entry.label is not None and entry.in_test_split == (split == "test")
        for path in entry.images
    ]
    images = torch.stack([read_image(path, size, 3) for path, _ in members])
    return ImageDataset(images, torch.tensor([label for _, label in members]), CLASSES)
