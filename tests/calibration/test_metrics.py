"""CRM, norms and the rule for tough blocks, against the paper's tables and NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from jacobiflow.calibration import Components, Metrics, matrix_norm, rank_correlation, tough_blocks
from tests.helpers.calibration_problems import randn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("values", "picked"),
    [
        # Table 2 of the paper: Img128cond, AFHQ, Img64uncond, Img64cond.
        ((6.52, 7.03, 3.08, 13.63, 9.66, 9.17, 70.54, 5.05), (6,)),
        ((51.85, 51.45, 66.76, 64.98, 73.77, 84.05, 76.64, 348.51), (7,)),
        ((22.29, 1.06, 1.01, 1.48, 0.77, 0.58, 14.78, 1.95), (0, 6)),
        ((141.22, 9.25, 1.36, 1.82, 7.68, 5.08, 3.08, 19.81), (0, 7)),
        # A share must be above a third; the last two blocks are never tough.
        ((), ()),
        ((100.0, 1.0), ()),
        ((1.0, 1.0, 1.0), ()),
        ((1.001, 1.0, 1.0), (0,)),
        ((0.1, 5.0, 5.0, 0.1), (1, 2)),
        ((1.0, math.inf, 1.0, 1.0), (1,)),
    ],
)
def test_tough_blocks_are_those_that_the_paper_picks(values: tuple[float, ...], picked: tuple[int, ...]) -> None:
    assert tough_blocks(values) == picked
    if len(values) == 8:
        assert tough_blocks(values, 0.33) == tough_blocks(values, 0.41) == picked


def test_crm_and_its_shares_are_the_formula_s() -> None:
    """They agree with two rows of Table 6 of the paper, to its printed digits."""
    parts = Components(131.84, 0.53, 0.19), Components(286.83, 1.21, 0.93)
    metrics = Metrics(({"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.0}), parts)
    assert metrics.crm == pytest.approx((70.54, 348.51), rel=0.02)
    assert metrics.crm_percent == pytest.approx([100 * crm / sum(metrics.crm) for crm in metrics.crm])
    assert [metrics.best_guess(block) for block in range(2)] == ["b", "a"]
    assert Metrics(({},), (Components(1.0, 0.0, 0.0),)).crm_percent == (0.0,)
    for name in ("crm", "crm_percent", "tough_blocks"):
        with pytest.raises(ValueError, match="CRM is not defined"):
            getattr(Metrics(({},), None), name)


@pytest.mark.parametrize("norm", [2, "fro", 1])
def test_a_norm_is_numpy_s_and_infinite_where_an_entry_is_not_finite(norm: Any) -> None:
    matrix = randn(7, 3)
    assert matrix_norm(matrix, norm) == pytest.approx(np.linalg.norm(matrix.numpy(), norm))
    for broken in (torch.nan, torch.inf):
        assert matrix_norm(torch.cat((matrix, torch.full((1, 3), broken))), norm) == math.inf


@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
@example(pairs=[(1, 1), (1, 2), (1, 3)])
@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_rank_correlation_is_spearman_s_ties_included(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    expected = scipy.stats.spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12, nan_ok=True)
