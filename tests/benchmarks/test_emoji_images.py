"""Emoji, read from a package made here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.emoji_images import CLASSES, emoji

TONES = ("1F3FB", "1F3FF")
GROUPS = {
    "face-smiling": 0, "face-hat": 0, "face-costume": None, "person": 1, "person-gesture": 2, "person-role": 3,
    "person-fantasy": 4, "person-sport": None, "hands": 5, "hand-prop": 5, "hand-fingers-open": 5, "cat-face": None,
    "family": None,
}  # fmt: skip


def pixels(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 4), dtype=np.uint8)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Ten emoji of each group, in no order, each with two skin tones, of which the second has no image."""
    folder = tmp_path / "img" / "google" / "64"
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for place, group in enumerate(GROUPS):
        for i in range(10):
            number = len(entries) * 3
            kinds = [
                {"unified": f"{number + k:X}", "image": f"{number + k}.png", "has_img_google": k < 2} for k in range(3)
            ]
            for kind in kinds[:2]:
                Image.fromarray(pixels(int(kind["image"][:-4]))).save(folder / kind["image"])
            tones = dict(zip(TONES, kinds[1:], strict=True)) if i else {}
            order = 1000 - place * 10 - i
            entries.append(
                kinds[0]
                | {"category": "any", "subcategory": group, "sort_order": order}
                | ({"skin_variations": tones} if tones else {})
            )
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    return tmp_path


def test_an_emoji_and_its_skin_tones_are_on_one_side_of_the_split(package: Path) -> None:
    entries = json.loads((package / "emoji.json").read_text())
    want: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for entry in reversed(entries):  # whose sort_order falls
        label = GROUPS[entry["subcategory"]]
        if label is not None:
            split = "test" if hashlib.sha256(entry["unified"].encode()).hexdigest()[:2] < "1a" else "train"
            numbers = [int(entry["image"][:-4])]
            want[split] += [(label, n) for n in numbers + [numbers[0] + 1] * ("skin_variations" in entry)]
    assert 5 < len(want["test"]) < 40
    for split in ("train", "test"):
        data = emoji(split, package, size=64)  # type: ignore[arg-type]
        assert data.labels is not None and data.classes == CLASSES
        assert data.labels.tolist() == [label for label, _ in want[split]]
        alpha = np.stack([pixels(number) for _, number in want[split]]).transpose(0, 3, 1, 2) / 255
        on_white = 255 * (alpha[:, :3] * alpha[:, 3:] + 1 - alpha[:, 3:])
        assert np.abs(data.images.numpy() - on_white).max() <= 1
    small = emoji("test", package)
    assert small.images.shape[1:] == (3, 32, 32)
    blocks = data.images.double().view(-1, 3, 32, 2, 32, 2).mean(dim=(3, 5))
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    both = torch.stack([small.images.double()[inside].flatten(), blocks[inside].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9, "not the same images, smaller"
