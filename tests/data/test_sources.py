"""Data sets by name, and what a data set is."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from jacobiflow.data import (
    FASHION_MNIST_CLASSES,
    SOURCES,
    DataError,
    ImageDataset,
    balanced_labels,
    bundled_fashion,
    digits,
    load_images,
    quantize,
    scale,
    sources,
)

PACKAGE = Path(sources.__file__).parent


def test_bundled_images_and_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    fashion, data = bundled_fashion(), digits()
    assert (fashion.images.shape, data.images.shape) == ((512, 1, 28, 28), (1797, 1, 8, 8))
    assert fashion.labels is not None and fashion.labels.bincount().tolist() == [52, 52] + [51] * 8
    assert (fashion.classes, data.classes) == (FASHION_MNIST_CLASSES, tuple("0123456789"))
    assert len(fashion.images.flatten(1).unique(dim=0)) == 512
    assert "Copyright (c) 2017 Zalando SE" in (PACKAGE / "FASHION_MNIST_LICENSE").read_text()
    assert data.images.unique().tolist() == [math.floor(k * 255 / 16 + 0.5) for k in range(17)]
    assert data.labels is not None and data.labels.unique().tolist() == list(range(10))
    images, labels = data.batch(torch.tensor([5, 3]))
    assert torch.equal(images, scale(data.images[[5, 3]]))
    assert labels is not None and labels.tolist() == [5, 3]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="digits: needs scikit-learn; pip install"):
        digits()


def test_images_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(load_images("fashion-512", 28, 1).images, bundled_fashion().images)
    assert len(load_images("digits", 8, 1)) == 1797
    with pytest.raises(DataError, match=r"^digits: images are 1x8x8, the flow takes 3x32x32; give other images"):
        load_images("digits", 32, 3)
    file = tmp_path / "0.png"
    Image.new("L", (4, 4)).save(file)
    assert load_images(str(tmp_path), 4, 1).images.shape == (1, 1, 4, 4)
    for source in ("fashion", "", str(tmp_path / "gone"), str(file)):
        with pytest.raises(DataError, match=f"^{source}: neither a folder nor one of fashion-512, fashion-mnist, dig"):
            load_images(source, 28, 1)
    test = ImageDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), None)
    monkeypatch.setitem(SOURCES, "mine", {"train": bundled_fashion(), "test": test}.__getitem__)
    assert load_images("mine", 4, 1, "test") is test


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_side=4), elements=st.floats(-3, 3, width=32)))
def test_levels_round_trip_and_values_are_rounded_to_the_nearest(values: NDArray[np.float32]) -> None:
    images, every = torch.from_numpy(values.copy()), torch.arange(256, dtype=torch.uint8)
    levels = quantize(images)
    assert levels.dtype == torch.uint8
    assert np.array_equal(images, values)
    assert (scale(levels) - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(quantize(images.double()), levels)
    assert torch.equal(quantize(scale(every)), every)
    torch.testing.assert_close(scale(every), torch.linspace(-1, 1, 256))
    assert scale(every)[[0, 255]].tolist() == [-1, 1]


def test_balanced_labels() -> None:
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(0, 1).tolist() == []
    for num, num_classes in ((-1, 3), (4, 0)):
        with pytest.raises(DataError, match=f"num={num}, num_classes={num_classes}: give"):
            balanced_labels(num, num_classes)


def test_a_data_set_is_of_bytes() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for wrong, labels, message in (
        (images.float(), None, r"images: torch.float32 of shape \(2, 1, 4, 4\); give torch.uint8"),
        (images[:0], None, "none of them 0"),
        (images, torch.zeros(3, dtype=torch.int64), r"labels: .*of shape \(2,\)"),
        (images, torch.zeros(2), "labels: torch.float32 .*give torch.int64"),
        (images, torch.tensor([-1, 2]), "labels from -1 to 2: give classes 0 and above"),
    ):
        with pytest.raises(DataError, match=message):
            ImageDataset(wrong, labels)
    with pytest.raises(DataError, match="labels from 0 to 2: give classes 0 to 1"):
        ImageDataset(images, torch.tensor([0, 2]), ("a", "b"))
    with pytest.raises(TypeError, match=r"images=.* of type list: give a torch.Tensor"):
        ImageDataset([1], None)  # type: ignore[arg-type]
