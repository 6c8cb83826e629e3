"""Figures show the right data, and their labels can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from matplotlib.axes import Axes

from jacobiflow.comparison.compare import Comparison, SamplerResult
from jacobiflow.evaluation import SampleErrors
from jacobiflow.plots import bench_figure
from jacobiflow.utils.timing import Timing
from tests.helpers.pictures import texts_fit


def make_comparison(batch_size: int, points: Mapping[str, tuple[float, float]]) -> Comparison:
    """Returns a comparison of the baselines, and of strategies with these seconds and largest errors."""
    points = {"growing cache": (8.0, 1e-6), "sequential": (4.0, 0.0), **points}
    timings = {name: Timing(seconds, seconds / 2, seconds * 3) for name, (seconds, _) in points.items()}
    rows = tuple(
        SamplerResult(name, timings[name], SampleErrors(1, error, 0.0, 0.0), None)
        for name, (_, error) in points.items()
    )
    return Comparison(batch_size, rows, Timing(0.02, 0.01, 0.03))


def markers_of(axis: Axes) -> list[tuple[float, float, float, float]]:
    """Returns seconds, error, and the ends of the bar of each marker."""
    lines = [(line, bar.get_segments()[0]) for line, _, (bar,) in axis.containers]
    return [(line.get_xdata()[0], line.get_ydata()[0], bar[0][0], bar[1][0]) for line, bar in lines]


def test_bench_draws_a_marker_for_every_strategy_in_every_panel() -> None:
    points = {"auto": (1.0, 1e-3), "[7-8-14-10]": (0.5, 2e-1), "jacobi": (2.0, 0.0)}
    comparisons = [make_comparison(size, {n: (x * size, size * y) for n, (x, y) in points.items()}) for size in (1, 4)]
    figure = bench_figure(comparisons)
    figure.draw_without_rendering()
    for axis, comparison in zip(figure.axes, comparisons, strict=True):
        size = comparison.batch_size
        assert (axis.get_title(), axis.get_xscale()) == (f"batch size {size}", "log")
        want = [(x * size, y * size, x * size / 2, x * size * 3) for x, y in points.values()]
        assert markers_of(axis) == [pytest.approx(values) for values in want]
        lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 2]
        assert [line.get_xdata()[0] for line in lines] == [0.02, 4.0, 8.0]
    captions = [text.get_text() for text in figure.legends[0].get_texts()]
    assert captions == ["encoding pass", "exact loop", "original sampler", *points]
    assert texts_fit(figure, [axis.title for axis in figure.axes])


@pytest.mark.filterwarnings("error")
def test_bench_draws_a_flow_without_an_original_sampler_and_errors_that_are_not_finite() -> None:
    comparison = make_comparison(1, {"a": (1.0, 0.0), "b": (2.0, math.inf)})
    figure = bench_figure([replace(comparison, results=comparison.results[1:])] * 3)
    figure.draw_without_rendering()
    assert len(figure.axes) == 3  # no empty panel
