"""Guesses: formulas, fits, and values that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jacobiflow as jf
from tests.helpers.oracle import convolved
from tests.helpers.solver_problems import error, normal

KERNEL, SHIFT = normal(3, 2, 2), normal(5, 2, seed=1)


def test_plain_guesses() -> None:
    z = normal(2, 4, 3)
    answer = normal(2, 4, 3, seed=1)
    kept = z.clone(), answer.clone()
    zeros = torch.cat((z[:, :1], torch.zeros(2, 3, 3)), dim=1)
    for guess, expected in ((jf.Latent(), z), (jf.Zeros(), zeros), (jf.WarmStart(answer), answer)):
        assert torch.equal(guess(z), expected)
        assert torch.equal(z, kept[0])
        assert torch.equal(answer, kept[1])
    assert jf.WarmStart(answer)(z.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_affine_is_affine_in_z_and_of_its_dtype(dtype: torch.dtype) -> None:
    log_scale, shift, z = normal(6, 3), normal(6, 3, seed=1), normal(4, 6, 3, seed=2)
    x = jf.MeanAffine(log_scale, shift.float())(z.to(dtype))
    assert x.dtype == dtype
    assert error(x.double(), log_scale.exp() * z + shift) < 1e-5


@pytest.mark.parametrize(("width", "length"), [(1, 1), (3, 8), (12, 5)])
def test_a_causal_linear_guess_is_its_convolution_and_its_shift(width: int, length: int) -> None:
    """Its kernel may be longer than the sequence."""
    kernel, shift, z = normal(width, 2, 2), normal(length, 2, seed=1), normal(3, length, 2, seed=2)
    guess, kept = jf.CausalLinear(kernel, shift), z.clone()
    assert error(guess(z), convolved(kernel, z, delay=0) + shift) < 1e-12
    assert torch.equal(z, kept)
    assert guess(z.float()).dtype == torch.float32


def test_a_fit_finds_a_causal_linear_map() -> None:
    kernel, shift = 0.5 * normal(4, 2, 2, seed=1), normal(20, 2, seed=2)
    z = normal(200, 20, 2, seed=3) + normal(20, 2, seed=4)
    x, before = convolved(kernel, z, delay=0) + shift, z.clone()
    guess = jf.CausalLinear.fit(x, z, 6)
    assert guess.kernel.shape == (7, 2, 2)
    assert error(guess.kernel[:4], kernel) < 3e-3
    assert guess.kernel[4:].abs().max() < 3e-3
    # Ridge regression shrinks: the fit is not exact, and its shift makes up for the mean.
    assert 1e-5 < error(guess(z), x) < 2e-2
    assert error(guess(z).mean(dim=0), x.mean(dim=0)) < 1e-12
    assert error(jf.CausalLinear.fit(x, z, 1).kernel, kernel[:2]) < 0.2
    assert torch.equal(z, before)
    assert jf.CausalLinear.fit(x, z).kernel.shape == (25, 2, 2)
    assert jf.CausalLinear.fit(x.float(), z.float()).kernel.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: jf.WarmStart(SHIFT[None])(normal(1, 4, 2)), r"WarmStart: value=.*: give .* \(1, 4, 2\)"),
        (lambda: jf.WarmStart(3)(normal(1, 4, 2)), "WarmStart: value=3"),  # type: ignore[arg-type]
        (lambda: jf.MeanAffine(SHIFT, SHIFT[:, :1]), r"MeanAffine: shift=a tensor \(5, 1\)"),
        (lambda: jf.MeanAffine(SHIFT, SHIFT).check(4, 2), r"MeanAffine.*\(5, 2\).*\(4, 2\)"),
        (lambda: jf.CausalLinear(torch.ones(3, 2, 4), SHIFT), r"CausalLinear: kernel=a tensor \(3, 2, 4\)"),
        (lambda: jf.CausalLinear(KERNEL * math.nan, SHIFT), "CausalLinear: kernel=.*: holds a NaN"),
        (
            lambda: jf.Solver(guess=jf.Bf16Sweeps(1, jf.CausalLinear(KERNEL, SHIFT))).check(5, 1, 1.0),
            r"CausalLinear.*\(5, 2\).*\(5, 1\)",
        ),
        (
            lambda: jf.Solver(correction=jf.Chord(KERNEL)).check(5, 3, 1.0),
            r"Chord\(kernel=\(3, 2, 2\)\).*tokens have 3",
        ),
    ],
)
def test_values_that_do_not_fit_are_refused(build: Callable[[], Any], names: str) -> None:
    with pytest.raises(jf.InputError, match=names):
        build()
