"""The report: its numbers, its JSON, and how it is found."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import jacobiflow as jf
from jacobiflow.calibration import (
    CalibrationReport,
    Components,
    ConvergenceCurve,
    Metrics,
)
from jacobiflow.calibration.report import GUESSES
from tests.helpers.calibration_problems import linear_flow, randn
from tests.helpers.invented import GUIDANCE, small
from tests.helpers.running import figures

pytestmark = pytest.mark.usefixtures("one_thread")

FLOW = linear_flow([0.15, 0.15, 2.0, 0.15, 0.15], num_classes=2)  # in float64
COUNTS: dict[str, tuple[int | None, ...]] = {"latent": (2, 4, 3), "zeros": (2, None, 3)}


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    """A report with every part, and with infinities."""
    measured = jf.calibrate(
        FLOW, randn(6, 1, 3, 3), torch.tensor([0, 1, 1, -1, 0, 0]), "fro", num_convergence_samples=3, per_class=True
    )
    row = {name: ConvergenceCurve((math.inf, 0.0), (math.inf, 0.0), {1e-3: counts}) for name, counts in COUNTS.items()}
    last = dict.fromkeys(GUESSES, ConvergenceCurve((1.0,), (1.0,), {1e-3: (1, 1, 1)}))
    return replace(
        measured, settings=replace(measured.settings, guidance=jf.Guidance(0.5)), curves={"noise": (*(row,) * 4, last)},
        segment_curves={2: {2: (last["latent"],) * 2}},
        metrics=measured.metrics | {1: Metrics(measured.igm, (Components(math.inf, 1.0, 0.0),) * 5)},
        gamma=((math.inf, 1.0),) * 2 + ((1.0, 2.0),) * 3,
    )  # fmt: skip


def test_metrics_are_those_in_the_norm_of_the_settings(report: CalibrationReport) -> None:
    z = randn(2, 9, 1)
    assert (report.crm, report.tough_blocks, report.num_blocks) == (report.metrics["fro"].crm, (2,), 5)
    for block in range(5):
        assert report.igm[block][report.best_guess(block)] == min(report.igm[block].values())
        expected = {"latent": z, "zeros": jf.Zeros()(z)}
        assert torch.equal(report.guess(block)(z), expected[report.best_guess(block)])


def test_sweeps_are_over_the_samples(report: CalibrationReport) -> None:
    """A sample that stays above the tolerance counts as many sweeps as there are tokens."""
    assert report.mean_sweeps("noise", 1e-3, "zeros") == pytest.approx((*[(2 + 9 + 3) / 3] * 4, 1))
    assert report.slowest_sweeps("noise", 1e-3, "zeros") == (9, 9, 9, 9, 1)
    best = [*([count or 9 for count in COUNTS[report.best_guess(block)]] for block in range(4)), [1, 1, 1]]
    means = [float(np.mean(counts)) for counts in best]
    assert report.mean_sweeps("noise", 1e-3) == pytest.approx(means)
    assert report.slowest_sweeps("noise", 1e-3) == tuple(map(max, best))
    with pytest.raises(ValueError, match="source='images'"):
        report.slowest_sweeps("images", 1e-3)


def test_class_spread_is_the_mean_and_deviation_over_classes(report: CalibrationReport) -> None:
    per_class = list(report.class_metrics.values())
    values = np.array([metrics.crm for metrics in per_class])
    ranks, percent = scipy.stats.rankdata(values, "min", axis=1), 100 * values / values.sum(axis=1, keepdims=True)
    for i, spread in enumerate(report.class_spread()):
        assert spread.crm_rank == pytest.approx((ranks[:, i].mean(), ranks[:, i].std()))
        assert spread.crm_percent == pytest.approx((percent[:, i].mean(), percent[:, i].std()))
        igm = np.array([[metrics.igm[i][name] for metrics in per_class] for name in GUESSES])
        for k, name in enumerate(GUESSES):
            assert spread.igm[name] == pytest.approx((igm[k].mean(), igm[k].std()))
            assert spread.num_best[name] == (igm.argmin(axis=0) == k).sum()
    undefined = replace(report, class_metrics={0: Metrics(report.igm, None)}).class_spread()
    assert all((spread.crm_rank, spread.crm_percent) == (None, None) for spread in undefined)
    with pytest.raises(ValueError, match="per_class=True"):
        replace(report, class_metrics={}).class_spread()


def test_a_report_comes_back_from_its_file_and_fits_its_flow_only(report: CalibrationReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    assert CalibrationReport.load(path) == report != replace(report, gamma=report.gamma[::-1])
    figures(path)  # JSON, without NaN or infinity
    report.check(copy.deepcopy(FLOW).bfloat16())
    with pytest.raises(ValueError, match=r"the report is of another flow.*calibrate this one"):
        report.check(small())
    path.write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"report .*report\.json: not a report of format_version 5; make it anew with"):
        CalibrationReport.load(path)


def test_a_report_is_found_by_its_guidance(report: CalibrationReport, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert jf.find_report(jf.load(tmp_path)) is None
    report.save(tmp_path / "report-b.json")
    replace(report, settings=replace(report.settings, guidance=None)).save(tmp_path / "report.json")
    for guidance, name in ((None, "report.json"), (jf.Guidance(0.5), "report-b.json"), (GUIDANCE, "report.json")):
        assert jf.find_report(jf.load(tmp_path).guided(guidance)) == tmp_path / name
