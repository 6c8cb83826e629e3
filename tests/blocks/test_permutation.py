"""Permutations of tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobiflow.models import Permutation


@given(st.permutations(range(7)))
def test_a_permutation_has_its_inverse(order: list[int]) -> None:
    permutation, x = Permutation(tuple(order)), torch.arange(14.0).view(1, 7, 2)
    assert torch.equal(permutation.inverse(permutation(x)), x)
    assert permutation(x)[0, :, 0].tolist() == [2.0 * t for t in order]
