"""Guesses: formulas, and values that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jacobiflow as jf
from tests.helpers.solver_problems import normal


def test_a_guess_is_its_formula_and_changes_no_input() -> None:
    z = normal(2, 4, 3)
    answer = normal(2, 4, 3, seed=1)
    kept = z.clone(), answer.clone()
    zeros = torch.cat((z[:, :1], torch.zeros(2, 3, 3)), dim=1)
    for guess, expected in ((jf.Latent(), z), (jf.Zeros(), zeros), (jf.WarmStart(answer), answer)):
        assert torch.equal(guess(z), expected)
        assert torch.equal(z, kept[0])
        assert torch.equal(answer, kept[1])
    assert jf.WarmStart(answer)(z.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "names"), [(normal(1, 5, 2), r"WarmStart: value=.*: give .* \(1, 4, 2\)"), (3, "WarmStart: value=3")]
)
def test_a_warm_start_that_does_not_fit_is_refused(value: Any, names: str) -> None:
    with pytest.raises(jf.InputError, match=names):
        jf.WarmStart(value)(normal(1, 4, 2))
