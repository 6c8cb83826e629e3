"""The small networks whose features tell Fashion-MNIST's classes, and emoji, apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.features import fashion, statistics_file, trained, training_statistics
from jacobiflow.data import load_images
from jacobiflow.evaluation import extract, load_features

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
SHAPES = {"fashion": ("fashion-512", 28, 1, 60_000), "emoji": ("emoji-256", 32, 3, 1229)}


def test_features_tell_classes_and_emoji_apart() -> None:
    network, data = trained("fashion"), load_images("fashion-512", 28, 1)
    features = network.train()(data.images[:60])  # in training mode, a batch would change the network
    assert (features.shape, features.dtype) == ((60, 64), torch.float32)
    torch.testing.assert_close(torch.cat([network(part) for part in data.images[:60].split(7)]), features)
    assert (network.output(network(data.images)).argmax(dim=1) == data.labels).double().mean() >= 0.92
    results = json.loads((ROOT / "docs" / "results" / "fashion-features.json").read_text())
    assert results["parameters"] == sum(p.numel() for p in network.parameters())
    images = load_images("emoji-256", 32, 3).images[::2]
    upright, mirrored = extract(trained("emoji"), [images]), extract(trained("emoji"), [images.flip(-1)])
    assert (torch.cdist(mirrored, upright).argmin(dim=1) == torch.arange(len(images))).double().mean() > 0.9
    with pytest.raises(ValueError, match=r"fashion features take torch.uint8 of shape \('N', 1, 28, 28\)"):
        fashion(images)


@pytest.mark.parametrize("kind", SHAPES)
def test_statistics_are_of_the_training_images(kind: str) -> None:
    *source, num = SHAPES[kind]
    features = load_features(f"{ROOT}/benchmarks/features.py:{kind}")
    some = extract(features, [load_images(*source).images[:300]]).double()  # type: ignore[arg-type]
    statistics = training_statistics(kind)
    assert statistics.num == num and statistics_file(kind).stat().st_size < 1e5
    deviation = statistics.covariance().diagonal().sqrt()
    assert ((some.mean(dim=0) - statistics.sum / num).abs() <= 5 * deviation / len(some) ** 0.5 + 1e-6).all()
    torch.testing.assert_close(some.std(dim=0), deviation, rtol=0.4, atol=1e-3)
