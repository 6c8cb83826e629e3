"""Figures of a report and sheets of intermediates: the data that they promise, and labels that can be read."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jacobiflow as jf
from jacobiflow.calibration import CalibrationReport
from tests.helpers.pictures import CAPTION, assert_placed, random_images, texts_fit
from tools.pictures.paper_figures import convergence_figure, intermediates_sheet, segments_figure


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    """The bundled one of digits-p1, whose blocks 2 and 3 are tough."""
    file = jf.find_report(jf.load("digits-p1"))
    assert file is not None
    return CalibrationReport.load(file)


def curves_of(axis: Axes) -> dict[str, tuple[float, ...]]:
    """The curves of a panel by label."""
    return {str(line.get_label()): tuple(line.get_ydata()) for line in axis.get_lines()}


def assert_readable(figure: Figure) -> None:
    figure.draw_without_rendering()
    (legend,) = figure.legends
    for axis in figure.axes:
        assert (axis.get_yscale(), axis.get_xlabel(), axis.get_xlim()[0]) == ("log", "sweeps", 0)
        assert axis.get_ylim()[0] == 1e-5  # smaller distances are rounding
        assert [text.get_text() for text in legend.get_texts()] == list(curves_of(axis))
    assert texts_fit(figure, [axis.title for axis in figure.axes])
    assert texts_fit(figure, legend.get_texts())


def test_convergence_draws_the_curves_of_the_report(report: CalibrationReport) -> None:
    figure = convergence_figure(report)
    for axis, start in zip(figure.axes, ("images", "noise"), strict=True):
        curves = [row[report.best_guess(block)] for block, row in enumerate(report.curves[start])]
        expected = {f"block {block}{' (tough)' * (block > 1)}": curve.median for block, curve in enumerate(curves)}
        assert curves_of(axis) == expected | {f"block {i}, slowest sample": curves[i].largest for i in (2, 3)}
        assert start in axis.get_title() or "fresh latents" in axis.get_title()
        assert len({line.get_color() for line in axis.get_lines()}) == 4
    assert "median" in figure.axes[0].get_ylabel()
    assert_readable(figure)


def test_segments_are_drawn_with_the_whole_block_beside_them(report: CalibrationReport) -> None:
    figure, count = segments_figure(report), report.settings.segments
    for axis, block in zip(figure.axes, (2, 3), strict=True):
        expected = {f"segment {i}": curve.median for i, curve in enumerate(report.segment_curves[block][count], 1)}
        whole = report.curves["noise"][block][report.best_guess(block)]
        assert curves_of(axis) == expected | {"all tokens at once": whole.median}
        assert re.search(rf"block {block}\b.*\b{count} segments\b.*\b{64 // count} tokens", axis.get_title())
    assert_readable(figure)


@pytest.mark.parametrize("denoised", [True, False])
def test_a_trace_is_a_row_a_sample_and_a_column_a_block(denoised: bool) -> None:
    columns = 3 + denoised
    images = random_images(3 * columns).view(columns, 3, 1, 3, 56)
    pixels = np.asarray(intermediates_sheet(list(images), denoised))
    height = (len(pixels) - CAPTION) // 3  # of a sample, with its caption; the names of the blocks stand above all
    for sample in range(3):
        top = sample * height + 2 * CAPTION
        assert_placed(pixels[top : top + height - CAPTION], images[:, sample], columns, zoom=5 if denoised else 6)
