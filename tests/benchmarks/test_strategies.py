"""The strategies that benchmarks/strategies.py times are those of the paper's Tables 3 and 4, in proportion to T."""

from __future__ import annotations

import pytest

import jacobiflow as jf
from benchmarks import strategies as script
from jacobiflow.calibration.report import GUESS_NAMES
from tests.helpers.invented import make_report, same

AFHQ = (51.85, 51.45, 66.76, 64.98, 73.77, 84.05, 76.64, 348.51)  # CRM, Table 2 of the paper
IMG64COND = (141.22, 9.25, 1.36, 1.82, 7.68, 5.08, 3.08, 19.81)
TABLE_4A = "7-1024-1-6 7-1-256-6 7-2-128-6 7-4-64-6 7-8-32-6 7-16-16-6"  # with 6 sweeps elsewhere, in place of 10
TABLE_4B = """
    0/7-256-1-6 0/7-256/1-1/64-6 0/7-256/2-1/32-6 0/7-256/4-1/16-6 0/7-256/8-1/8-6 0/7-256/4-1/24-6
    0/7-256/8-1/12-6 0/7-16/8-8/12-6 0/7-16/8-10/12-6 0/7-16/8-12/12-6
"""  # with 12, which is 3 T / 8 over 8, in place of 13


@pytest.mark.parametrize(("crm", "tokens", "published"), [(AFHQ, 1024, TABLE_4A), (IMG64COND, 256, TABLE_4B)])
def test_the_grid_has_the_papers_settings(crm: tuple[float, ...], tokens: int, published: str) -> None:
    """Of blocks that need 6 sweeps where they are not tough. Every name is a strategy, and none is there twice."""
    report = make_report(crm, num_tokens=tokens)
    grid = script.grid(report)
    texts = ["Jacobi-30", "Jacobi-60", *(f"[{text}]" for text in published.split())]
    plans = [jf.Strategy.parse(name, report) for name in grid]
    assert all(jf.Strategy.parse(text, report) in plans for text in texts)
    assert len(set(grid)) == len(grid)


def test_without_a_tough_block_the_slowest_is_stacked() -> None:
    noise = [dict.fromkeys(GUESS_NAMES, same(3, sweeps)) for sweeps in (4, 9, 5)]
    grid = script.grid(make_report((1.0, 1.0, 1.0), noise=noise))
    assert grid[:5] == ["Jacobi-30", "Jacobi-60", "[1-16-1-3]", "[1-16-1-5]", "[1-16-1-10]"]
    assert {text.split("-")[0] for text in grid[2:]} == {"[1"}
