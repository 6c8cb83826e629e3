"""Data sets in memory, and the levels of their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from jacobiflow.data import DataError, ImageDataset, balanced_labels, quantize, scale


@given(hnp.arrays(np.float32, hnp.array_shapes(max_side=4), elements=st.floats(-3, 3, width=32)))
def test_levels_round_trip_and_values_are_rounded_to_the_nearest(values: NDArray[np.float32]) -> None:
    images, every = torch.from_numpy(values.copy()), torch.arange(256, dtype=torch.uint8)
    levels = quantize(images)
    assert levels.dtype == torch.uint8
    assert (scale(levels) - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(quantize(images.double()), levels)
    assert torch.equal(quantize(scale(every)), every)
    torch.testing.assert_close(scale(every), torch.linspace(-1, 1, 256))
    assert quantize(images * torch.nan).eq(0).all()


def test_a_data_set_holds_bytes_and_classes() -> None:
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    images = torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    pixels, labels = ImageDataset(images, torch.tensor([3, 5])).batch(torch.tensor([1, 0]))
    assert torch.equal(pixels, scale(images.flip(0))) and torch.equal(labels, torch.tensor([5, 3]))
    for wrong, labels, message in (
        (images.float(), None, r"images=a tensor \(2, 1, 4, 4\) of torch.float32: give torch.uint8"),
        (images[:0], None, "each at least 1"),
        (images, torch.zeros(3, dtype=torch.int64), r"labels=.*of shape \(2,\)"),
        (images, torch.zeros(2), "labels=.* of torch.float32: give torch.int64"),
        (images, torch.tensor([-1, 2]), "labels=.* each at least 0"),
    ):
        with pytest.raises(DataError, match=message):
            ImageDataset(wrong, labels)
    with pytest.raises(TypeError, match=r"images=.* of type list: give a torch.Tensor"):
        ImageDataset([1], None)  # type: ignore[arg-type]
