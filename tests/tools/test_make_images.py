"""Emoji are read from their package, and small networks tell them, and Fashion-MNIST's classes, apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.features import fashion, statistics_file, trained
from jacobiflow.data import load_images
from jacobiflow.evaluation import FeatureStatistics, extract_features, load_features
from tools.models.make_images import emoji

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
GROUPS = {"face-hat": 0, "face-costume": None, "person": 1, "person-role": 3, "hands": 5, "hand-prop": 5, "cat": None}


def test_an_emoji_and_its_skin_tones_are_in_one_split(tmp_path: Path) -> None:
    """Of seven groups of ten emoji in reverse order, each with two skin tones, of which the second has no image."""
    folder, entries = tmp_path / "img" / "google" / "64", []
    folder.mkdir(parents=True)
    expected: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for i, (group, label) in enumerate(label for label in GROUPS.items() for _ in range(10)):
        tones = [{"unified": f"{i:X}-{k}", "image": f"{i}-{k}.png", "has_img_google": k < 2} for k in range(3)]
        for k in range(2):
            Image.fromarray(np.full((64, 64, 4), (2 * i + k, 0, 0, 255), np.uint8)).save(folder / f"{i}-{k}.png")
        variations = {"skin_variations": dict(enumerate(tones[1:]))}
        entries.append(tones[0] | variations | {"subcategory": group, "sort_order": 1000 - i})
        if label is not None:
            split = "test" if hashlib.sha256(f"{i:X}-0".encode()).hexdigest()[:2] < "1a" else "train"
            expected[split] = [(label, 2 * i), (label, 2 * i + 1), *expected[split]]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    for split, rows in expected.items():
        data = emoji(split, tmp_path)  # type: ignore[arg-type]
        assert data.images.shape == (len(rows), 3, 32, 32) and data.labels is not None
        assert list(zip(data.labels.tolist(), data.images[:, 0, 16, 16].tolist(), strict=True)) == rows


def test_features_tell_classes_and_emoji_apart() -> None:
    network, data = trained("fashion"), load_images("fashion-512", 28, 1)
    assert (network.output(network(data.images)).argmax(dim=1) == data.labels).double().mean() >= 0.92
    images = load_images("emoji-256", 32, 3).images[::2]
    upright, mirrored = (
        extract_features(trained("emoji"), images),
        extract_features(trained("emoji"), images.flip(-1)),
    )
    assert (torch.cdist(mirrored, upright).argmin(dim=1) == torch.arange(len(images))).double().mean() > 0.9
    with pytest.raises(ValueError, match=r"fashion features take torch.uint8 of shape \('N', 1, 28, 28\)"):
        fashion(images)


@pytest.mark.parametrize(
    ("kind", "source", "num"), [("fashion", ("fashion-512", 28, 1), 60_000), ("emoji", ("emoji-256", 32, 3), 1229)]
)
def test_statistics_are_of_the_training_images(kind: str, source: tuple[str, int, int], num: int) -> None:
    features = load_features(f"{ROOT}/benchmarks/features.py:{kind}")
    some = extract_features(features, load_images(*source).images[:300]).double()
    statistics = FeatureStatistics.load(statistics_file(kind))
    assert statistics.num == num
    deviation = statistics.covariance().diagonal().sqrt()
    assert ((some.mean(dim=0) - statistics.sum / num).abs() <= 5 * deviation / len(some) ** 0.5 + 1e-6).all()
    torch.testing.assert_close(some.std(dim=0), deviation, rtol=0.4, atol=1e-3)
