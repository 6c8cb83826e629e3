"""Latents and labels: their distribution, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacobiflow.models.latents import draw_labels, draw_latents


@given(
    seed=st.integers(0, 2**63 - 2), first=st.integers(0, 10**9), num=st.integers(1, 5), skip=st.integers(0, 4),
    classes=st.integers(1, 1000),
)  # fmt: skip
def test_a_draw_depends_on_its_seed_and_number_only(seed: int, first: int, num: int, skip: int, classes: int) -> None:
    together = draw_latents(num + skip, 3, 2, seed, first)
    alone = draw_latents(num, 3, 2, seed, first + skip)
    assert torch.equal(together[skip:], alone)
    labels = draw_labels(num + skip, classes, seed, first)
    assert torch.equal(labels[skip:], draw_labels(num, classes, seed, first + skip))
    assert ((labels >= 0) & (labels < classes)).all()
    assert not torch.equal(alone, draw_latents(num, 3, 2, seed + 1, first + skip))
    assert len(together.flatten().unique()) == together.numel()


def test_latents_are_standard_normal() -> None:
    """Moments of 64,000 draws within four standard errors, and no correlation of samples, tokens or channels."""
    z = draw_latents(1000, 16, 4, seed=1).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[..., 1:], z[..., :-1])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
    assert draw_latents(1, 2, 2).dtype == torch.float32


def test_labels_are_uniform_and_do_not_follow_the_latents() -> None:
    labels = draw_labels(4000, 10, seed=1)
    expected = 400
    assert (((labels.bincount(minlength=10) - expected) ** 2) / expected).sum() < 30  # chi^2 of 9: 5e-4
    z = draw_latents(4000, 1, 1, seed=1).flatten().double()
    for value in (z, z.abs()):  # the size would follow the label, were both of the same random bits
        correlation = torch.corrcoef(torch.stack((value, labels.double())))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(4000)


def test_a_run_that_exceeds_memory_fails_before_it_draws() -> None:
    with pytest.raises(MemoryError):
        draw_latents(10**8, 2**16, 48)
