"""Partitions: segments and windows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf


@given(length=st.integers(1, 60), data=st.data())
def test_segments_tile_the_sequence_in_nearly_equal_lengths(length: int, data: st.DataObject) -> None:
    partition = jf.Segments(data.draw(st.integers(1, length)))
    partition.check(length)
    stops = [partition.stop(front, length) for front in range(length)]
    assert all(front < stop <= length for front, stop in enumerate(stops))
    assert sorted(set(stops)) == [(i + 1) * length // partition.count for i in range(partition.count)]
    lengths = [stops.count(stop) for stop in set(stops)]
    assert max(lengths) - min(lengths) <= 1


def test_windows_double_up_to_half_of_the_sequence() -> None:
    sizes = {1: [], 63: [], 64: [32], 65: [32], 196: [32, 64], 256: [32, 64, 128]}
    for length, tried in sizes.items():
        assert jf.Window.candidates(length) == tuple(jf.Window(size) for size in tried)
