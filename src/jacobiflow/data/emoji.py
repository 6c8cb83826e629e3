"""People, faces and hands of Noto Emoji, from the npm package emoji-datasource-google."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from jacobiflow.checks import check_choice
from jacobiflow.data.dataset import DataError, ImageDataset
from jacobiflow.data.folder import read_image
from jacobiflow.data.idx import Split

EMOJI_CLASSES = ("face", "person", "gesture", "profession", "fantasy", "hand")
EMOJI_FOLDER = Path("node_modules/emoji-datasource-google")
_GROUPS = {"person": 1, "person-gesture": 2, "person-role": 3, "person-fantasy": 4, "hands": 5, "hand-prop": 5}
_PREFIXES = {"face-": 0, "hand-": 5}  # of the groups of faces by expression, and of hands by fingers
_NOT_FACES = "face-costume"  # a ghost, a robot
_TESTED = 26  # of 256: a tenth of the emoji
_REMEDY = "run npm install emoji-datasource-google@16.0.0 here"


class Emoji(NamedTuple):
    """An entry of the package's index: its code points, category, group, and images, one for each skin tone."""

    code: str
    category: str
    group: str
    images: tuple[Path, ...]

    @property
    def label(self) -> int | None:
        """Its class among `EMOJI_CLASSES`, `None` where it is of none."""
        if self.group == _NOT_FACES:
            return None
        by_prefix = (label for start, label in _PREFIXES.items() if self.group.startswith(start))
        return _GROUPS.get(self.group, next(by_prefix, None))

    @property
    def in_test_split(self) -> bool:
        """Whether it and its skin tones are of the test split."""
        return hashlib.sha256(self.code.encode()).digest()[0] < _TESTED


def read_index(folder: str | Path = EMOJI_FOLDER) -> list[Emoji]:
    """All emoji of the package in the order of Unicode's chart. **Raises** `DataError` as `emoji` does."""
    index, images = Path(folder) / "emoji.json", Path(folder) / "img" / "google" / "64"
    if not os.path.isfile(index):
        raise DataError(f"{index}: no such file; {_REMEDY}")
    try:
        found = []
        for entry in sorted(json.loads(index.read_bytes()), key=lambda entry: (entry["sort_order"], entry["unified"])):
            tones = [entry, *entry.get("skin_variations", {}).values()]
            drawn = tuple(images / tone["image"] for tone in tones if tone["has_img_google"])
            found.append(Emoji(entry["unified"], entry["category"], entry["subcategory"], drawn))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not the index of that package ({error!r}); {_REMEDY}") from error


def emoji(split: Split = "train", folder: str | Path = EMOJI_FOLDER, size: int = 32) -> ImageDataset:
    """Emoji of people, faces and hands in all skin tones, on white, resized to `size` x `size`.

    An emoji and its skin tones are on one side of the split: the test split has those whose code points, as the index
    writes them, have a SHA-256 that begins with a byte below 26, a tenth of them. The images are Google's Noto Emoji,
    Apache-2.0; the index of emoji is MIT.

    **Arguments:** `folder` is of the package: `npm install emoji-datasource-google@16.0.0` makes it.

    **Raises** `DataError` where the package or one of its images is missing or broken, or `size` is above 64,
    `ValueError` for another split.
    """
    check_choice("split", split, ("train", "test"))
    found = [
        (path, entry.label)
        for entry in read_index(folder)
        if entry.label is not None and entry.in_test_split == (split == "test")
        for path in entry.images
    ]
    if not found:
        raise DataError(f"{folder}: no emoji of the {split} split in its index; {_REMEDY}")
    images = torch.stack([read_image(path, size, 3) for path, _ in found])
    return ImageDataset(images, torch.tensor([label for _, label in found]), EMOJI_CLASSES)
