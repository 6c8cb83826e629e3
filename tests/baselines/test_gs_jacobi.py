"""The settings of the GS-Jacobi paper's Tables 3 and 4, for reports of one and of two tough blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import jacobiflow as jf
from jacobiflow.baselines import gs_jacobi_grid

PLAIN = ["Jacobi-30", "Jacobi-60"]


@cache
def report_of(model: str) -> jf.Report:
    path = jf.load(model).report_file
    assert path is not None
    return jf.Report.load(path)


def test_one_tough_block() -> None:
    report = report_of("fashion-p2")  # block 7, 196 tokens
    grid = gs_jacobi_grid(report)
    assert grid[:2] == PLAIN
    assert len(set(grid)) == len(grid)
    found = [text[1:-1].split("-") for text in grid[2:]]
    assert {stack for stack, *_ in found} == {"7"}
    alone = [int(rest) for _, count, sweeps, rest in found if (count, sweeps) == ("196", "1")]
    assert alone == [6, 8, 10, 12, 14, 16, 20, 30]
    pairs = {(int(count), int(sweeps)) for _, count, sweeps, _ in found} - {(196, 1)}
    assert pairs == {
        (1, 128), (2, 64), (4, 32), (8, 16), (16, 8), (32, 4), (1, 256), (2, 128), (4, 64), (8, 32), (16, 16), (32, 8),
        (1, 24), (2, 12), (4, 6), (8, 3), (16, 1), (1, 49), (2, 24), (4, 12), (8, 6), (16, 3), (32, 1),
    }  # fmt: skip
    assert {f"[7-8-32-{rest}]" for rest in (6, 10, 12, 14, 16, 20)} <= set(grid)
    assert len(grid) == 2 + 8 + 6 * len(pairs)


def test_the_short_form() -> None:
    assert gs_jacobi_grid(report_of("fashion-p2"), short=True) == [
        *PLAIN, "[7-196-1-6]", "[7-196-1-10]", "[7-1-24-6]", "[7-4-6-6]", "[7-8-3-6]", "[7-1-49-6]", "[7-4-12-6]",
        "[7-8-6-6]",
    ]  # fmt: skip


def test_two_tough_blocks() -> None:
    report = report_of("digits-p1")
    first, second = sorted(report.tough_blocks, key=lambda block: -report.crm[block])
    grid, stack = gs_jacobi_grid(report), f"{first}/{second}"
    for text in ("64-1-10", "8-32-20", "64/1-1/64-6", "64/8-1/13-6", "16/8-8/13-6", "16/8-12/13-6"):
        assert f"[{stack}-{text}]" in grid
    assert not any("/1-" in text or "16/8" in text for text in gs_jacobi_grid(report, short=True))
    strategy = jf.Strategy.parse(f"[{stack}-64/8-1/13-6]", report)
    assert strategy.solvers[first].partition.count == 64


@pytest.mark.parametrize("model", ["fashion-p2", "digits-p1", "digits-maf"])
def test_every_setting_is_a_strategy(model: str) -> None:
    report = report_of(model)
    assert set(gs_jacobi_grid(report, short=True)) <= set(gs_jacobi_grid(report))
    for text in gs_jacobi_grid(report):
        tough = [int(block) for block in text[1:].partition("-")[0].split("/")] if text[0] == "[" else []
        assert set(tough) == (set(report.tough_blocks) if tough else set())
        strategy = jf.Strategy.parse(text, report)
        for block, solver in enumerate(strategy.solvers):
            assert solver.guess == report.guess(block)
            assert solver.stopping.ebound == 1e-8  # the early stop of the paper's Algorithm 1


def test_without_a_tough_block_plain_sweeps_are_left() -> None:
    report = report_of("fashion-p2")
    metrics = report.metrics[report.settings.norm]
    without_crm = replace(report, metrics={report.settings.norm: replace(metrics, components=None)})
    assert metrics.components is not None
    even = replace(report, metrics={report.settings.norm: replace(metrics, components=metrics.components[:1] * 8)})
    for found in (None, without_crm, even):
        assert gs_jacobi_grid(found) == gs_jacobi_grid(found, short=True) == PLAIN
