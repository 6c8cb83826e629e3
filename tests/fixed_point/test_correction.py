"""Corrections: convolutions against plain loops, fits to linear maps, and chords that do not fit."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.context import NO_CONTEXT
from jacobiflow.fixed_point import convolution
from tests.helpers.oracle import convolved, sequential
from tests.helpers.solver_problems import Watched, attempt, error, normal

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel, which may be longer than the run, tokens, and their images."""
    batch, length, channels, width = (draw(st.integers(1, most)) for most in (3, 8, 4, 12))
    seed = draw(st.integers(0, 10**6))
    x, g = normal(2, batch, length, channels, seed=seed).unbind()
    return normal(width, channels, channels, seed=seed + 1), x, g


@given(steps(), st.data())
def test_a_chord_adds_its_convolution_of_the_residual(step: tuple[Tensor, Tensor, Tensor], data: st.DataObject) -> None:
    """In one part or in several; a residual that overflowed counts as 0."""
    kernel, x, g = step
    places = st.tuples(*(st.integers(0, size - 1) for size in x.shape))
    for tensor in (x, g):
        for place in data.draw(st.lists(places, max_size=3)):
            tensor[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    before = x.clone(), g.clone()
    residual, finite = torch.where((g - x).isfinite(), g - x, 0), g.isfinite()
    stepped = jf.Chord(kernel)(x, g)
    assert error(stepped[finite], (g + convolved(kernel, residual, delay=1))[finite]) < 1e-12
    with patch.object(convolution, "_MAX_REGRESSORS", 1):
        assert error(jf.Chord(kernel)(x, g)[finite], stepped[finite]) < 1e-12
    for tensor, same in zip((x, g), before, strict=True):
        assert tensor.equal(same) or tensor.isnan().any()
    x[:, 0] = g[:, 0]  # bit for bit, since Proposition 1 rests on it
    assert torch.equal(jf.Chord(kernel)(x, g)[:, :2].nan_to_num(), g[:, :2].nan_to_num())


def test_tokens_keep_their_dtype() -> None:
    """Under autocast too, which is for networks."""
    x, g = normal(2, 3, 5, 2).float().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        assert jf.Chord(normal(3, 2, 2))(x, g).dtype == torch.float32


BAND = torch.stack((0.35 * normal(2, 2, seed=1), 0.15 * normal(2, 2, seed=2)))


def linear(x: Tensor, z: Tensor, _: Any = None) -> Tensor:
    """x_t = z_t + BAND[0] x_(t-1) + BAND[1] x_(t-2)."""
    return z + convolved(BAND, x, delay=1)


def solution(z: Tensor) -> Tensor:
    return sequential(lambda x: linear(x, z), z)


def inverse(width: int) -> Tensor:
    """The first entries of (I - Gamma)^-1 after its identity: answers to impulses."""
    impulses = torch.zeros(2, width + 1, 2, dtype=torch.float64)
    impulses[:, 0] = torch.eye(2)
    return solution(impulses)[:, 1:].permute(1, 2, 0)


def test_a_fit_solves_a_banded_linear_map_in_few_sweeps() -> None:
    z, unseen = normal(16, 48, 2, seed=6), normal(4, 48, 2, seed=7)
    x, answer, block = solution(z), solution(unseen), Watched(linear)
    before, five = (x.clone(), z.clone()), jf.Stopping(5)
    for guess in (jf.Latent(), jf.CausalLinear.fit(x, z, 4)):
        block.calls.clear()
        chord = jf.Chord.fit(jf.Problem(block, z), x, guess(z))
        assert len(block.calls) <= 24
        assert chord.kernel.shape == (24, 2, 2)
        assert error(chord.kernel[:3], inverse(3)) < 0.1
        plain, corrected = (
            error(attempt(block, unseen, jf.Solver(jf.Whole(), guess, five, correction), tolerance=None).x, answer)
            for correction in (jf.Plain(), chord)
        )
        assert corrected < min(1e-4, plain / 100)
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])
    fitted = jf.Chord.fit(jf.Problem(block, z.float()), x.float(), z.float(), width=3).kernel
    assert fitted.dtype == torch.float32
    assert error(fitted.double(), inverse(3)) < 0.1


class Scripted:
    """Call k moves every token by residuals[k], sample by sample."""

    def __init__(self, residuals: list[tuple[float, ...]]) -> None:
        self.residuals = iter(residuals)
        self.seen: list[Tensor] = []

    def init_cache(self, z: Tensor, context: jf.Context = NO_CONTEXT) -> None:
        return None

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: None) -> Tensor:
        self.seen.append(x[:, -1, 0].clone())
        return (x + torch.tensor(next(self.residuals)).view(-1, 1, 1))[:, start:stop]


class Marked(jf.Correction):
    """Adds 1000, so that a step shows whether it was corrected."""

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        return g + 1000


GROWTH: dict[str, tuple[list[float], str]] = {  # residuals sweep by sweep, and which steps are corrected
    "four times the least": ([1, 4, 4, 4, 4, 4, 4], "yyyyyyy"),
    "above it three times": ([1, 4.1, 4.1, 4.1, 0.1, 0.1, 0.1], "yyynnnn"),
    "above it twice": ([1, 5, 5, 1, 5, 5, 1], "yyyyyyy"),
    "above a later least": ([1, 0.1, 0.5, 0.3, 0.5, 0.5, 0.5], "yyyyyyn"),
    "above an earlier least": ([0.1, 1, 0.5, 0.5, 0.5, 0.5, 0.5], "yyynnnn"),
    "overflow": ([1, math.inf, math.inf, math.inf, 1, 1, 1], "yyynnnn"),
}


def test_a_correction_is_given_up_where_residuals_stay_far_above_the_least() -> None:
    """More than four times, for three sweeps in a row; each sample for itself, from that sweep on."""
    residuals = list(zip(*(row for row, _ in GROWTH.values()), strict=True))
    block = Scripted([*residuals, [0.0] * len(GROWTH)])
    solver = jf.Solver(jf.Whole(), jf.Zeros(), jf.Stopping(7), Marked())
    x = attempt(block, torch.zeros(len(GROWTH), 12, 1, dtype=torch.float64), solver).x
    for n, (row, corrected) in enumerate(GROWTH.values()):
        at = 0.0
        for k, (residual, mark) in enumerate(zip(row, corrected, strict=True)):
            assert block.seen[k][n] == pytest.approx(at), (list(GROWTH)[n], k)
            at = at + residual + (1000 if mark == "y" else 0)
            at = at if math.isfinite(at) else 0.0  # back to the guess
        assert x[n, -1] == pytest.approx(at)
