"""Figures: the curves of a calibration report, and errors of strategies against their time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobiflow.calibration import Report
from jacobiflow.comparison import ENCODING_PASS, Comparison
from jacobiflow.errors import InputValueError
from jacobiflow.plots.style import (
    FONT_SIZE,
    INK,
    ORDERED,
    OTHER,
    SAMPLERS,
    Style,
    clear,
    new_figure,
    plain_ticks,
    sampler_style,
    styled,
)

_HEIGHT = 4.2  # inches, of figures of a report
_LEAST = 1e-5  # smaller distances are rounding
_STARTS = {"images": "latents of images", "noise": "fresh latents"}
_CAPTION = 28  # characters on a line of the legend of a benchmark
_COLUMNS = 2  # of panels, and of that legend
_MARKERS = [style.marker for style in (*SAMPLERS.values(), OTHER)]


@styled
def convergence_figure(report: Report) -> Figure:
    """Draws the distance to the solution X* by sweep, from each block's best guess by IGM (Figure 2 of the paper).

    Lines are the median sample; the slowest one of a tough block is dotted. There is a panel for each start in the
    report.
    """
    figure = new_figure(_HEIGHT)
    panels = figure.subplots(1, len(report.traces), sharey=True, squeeze=False)[0]
    tough = report.tough_blocks if report.components else ()
    for axis, (start, rows) in zip(panels, report.traces.items(), strict=True):
        for block, row in enumerate(rows):
            trace, color = row[report.best_guess(block)], _shade(len(rows) - 1 - block, len(rows))
            if block in tough:
                axis.plot(trace.median, color=color, label=f"block {block} (tough)", linewidth=2.6)
                axis.plot(trace.largest, ":", color=color, label=f"block {block}, slowest sample")
            else:
                axis.plot(trace.median, color=color, label=f"block {block}", linewidth=1.4)
        axis.set_title(f"from {_STARTS[start]}{', guided' if report.settings.guidance else ''}")
    _label_sweeps(figure, report)
    return figure


@styled
def segments_figure(report: Report) -> Figure:
    """Draws the distance to the solution X* by sweep in each segment of the tough blocks (Figure 5 of the paper).

    Lines are the median sample of fresh latents, from the block's best guess by IGM, with the segments before solved.
    """
    if not report.segment_traces:
        raise InputValueError("no block of this report is tough: there are no segments to draw")
    figure = new_figure(_HEIGHT)
    panels = figure.subplots(1, len(report.segment_traces), sharey=True, squeeze=False)[0]
    for axis, (block, counts) in zip(panels, report.segment_traces.items(), strict=True):
        traces = counts[report.settings.segments]
        for i, trace in enumerate(traces):
            axis.plot(trace.median, color=_shade(i, len(traces)), label=f"segment {i + 1}")
        whole = report.traces["noise"][block][report.best_guess(block)]
        color = sampler_style("jacobi").color
        axis.plot(whole.median, ":", color=color, label="all tokens at once", linewidth=2.2)
        axis.set_title(f"block {block}: {len(traces)} segments of {report.num_tokens // len(traces)} tokens")
    _label_sweeps(figure, report)
    return figure


def _shade(number: int, count: int) -> Any:
    """The colour of one of `count` things in an order; the last still shows on white."""
    return ORDERED(0.85 * number / max(count - 1, 1))


def _label_sweeps(figure: Figure, report: Report) -> None:
    """Labels the axes, and draws the legend that all panels share."""
    for axis in figure.axes:
        last = max(int((np.asarray(line.get_ydata(), float) > _LEAST).sum()) for line in axis.get_lines())
        axis.set(yscale="log", xlabel="sweeps", xlim=(0, last), ylim=(_LEAST, None))
        clear(axis)
    first = figure.axes[0]
    first.set_ylabel(f"largest |X$^{{(k)}}$ − X*|, median of {report.settings.traced} samples")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)


@styled
def bench_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draws the largest error against seconds: a panel for each batch size, a marker for each strategy.

    A bar goes from the fastest to the slowest round. Vertical lines are the encoding pass, which no solver beats, and
    the baselines, which are exact. Errors that are not finite are left out.
    """
    baselines = (ENCODING_PASS, *reversed(comparisons[0].baselines))
    styles = _distinct_styles(row.strategy for comparison in comparisons for row in comparison.others)
    captions = [textwrap.fill(name.replace("$", r"\$"), _CAPTION) for name in (*baselines, *styles)]
    columns = min(len(comparisons), _COLUMNS)
    lines = -(-len(comparisons) // columns)
    rows = -(-len(captions) // _COLUMNS)
    most = max(caption.count("\n") + 1 for caption in captions)
    figure = new_figure(2.8 * lines + 0.6 + rows * (most + 0.6) * FONT_SIZE / 60)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axis, comparison in zip(panels, comparisons, strict=False):
        for name, line in zip(baselines, (":", "--", "-."), strict=False):
            seconds = comparison.floor if name == ENCODING_PASS else comparison.row(name).seconds
            color = INK if name == ENCODING_PASS else sampler_style(name).color
            handles[name] = axis.axvline(seconds.median, color=color, linestyle=line, linewidth=1.2)
        for row in comparison.others:
            style, seconds = styles[row.strategy], row.seconds
            handles[row.strategy] = axis.errorbar(
                seconds.median, row.error.max,
                xerr=[[seconds.median - seconds.min], [seconds.max - seconds.median]],
                color=style.color, marker=style.marker, linestyle="", elinewidth=1.2, clip_on=False,
            )  # fmt: skip
        axis.set_title(f"batch size {comparison.batch_size}")
        _label_seconds(axis)
    # Logarithmic from the least error on, with 0 below.
    errors = [row.error.max for comparison in comparisons for row in comparison.others]
    logarithmic = [error for error in errors if 0 < error < math.inf] or [1e-3]
    panels[0].set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(logarithmic))), linscale=0.5)
    panels[0].set_ylim(0, 3 * max(logarithmic))
    for axis in panels[len(comparisons) :]:
        axis.set_axis_off()
    figure.supxlabel("seconds for the batch: median, fastest and slowest round")
    figure.supylabel("largest error of an entry of the images")
    figure.legend(list(handles.values()), captions, loc="outside upper center", ncols=_COLUMNS)
    return figure


def _distinct_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name: the colour of `sampler_style`, and markers that differ within a colour."""
    styles: dict[str, Style] = {}
    for name in dict.fromkeys(names):
        color, marker = sampler_style(name)
        first = _MARKERS.index(marker)
        choices = [Style(color, marker) for marker in _MARKERS[first:] + _MARKERS[:first]]
        styles[name] = next((style for style in choices if style not in styles.values()), choices[0])
    return styles


def _label_seconds(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    between = (2, 5) if high < 30 * low else (3,) if high < 1000 * low else ()
    plain_ticks(axis.xaxis, (1, *between))
    clear(axis)
