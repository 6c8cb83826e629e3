"""Curves of a calibration report."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobiflow.calibration import Report
from jacobiflow.errors import InputValueError
from jacobiflow.plots.style import ORDERED, clear, new_figure, sampler_style, styled

_HEIGHT = 3.8  # inches
_LEAST = 1e-5  # smaller distances are rounding
_STARTS = {"images": "latents of images", "noise": "fresh latents"}


@styled
def convergence_figure(report: Report) -> Figure:
    """Draws the distance to the solution X* by sweep, from each block's best guess by IGM (Figure 2 of the paper).

    Lines are the median sample; the slowest one of a tough block is dotted. There is a panel for each start in the
    report.
    """
    figure, panels = _panels(len(report.traces))
    tough = report.tough_blocks if report.components else ()
    for axis, (start, rows) in zip(panels, report.traces.items(), strict=True):
        for block, row in enumerate(rows):
            trace, color = row[report.best_guess(block)], _shade(len(rows) - 1 - block, len(rows))
            if block in tough:
                axis.plot(trace.median, color=color, label=f"block {block} (tough)", linewidth=2.6)
                axis.plot(trace.largest, ":", color=color, label=f"block {block}, slowest sample")
            else:
                axis.plot(trace.median, color=color, label=f"block {block}", linewidth=1.4)
        _label(axis, f"from {_STARTS[start]}{', guided' if report.settings.guidance else ''}")
    _finish(figure, report.settings.traced)
    return figure


@styled
def segments_figure(report: Report) -> Figure:
    """Draws the distance to the solution X* by sweep in each segment of the tough blocks (Figure 5 of the paper).

    Lines are the median sample of fresh latents, from the block's best guess by IGM, with the segments before solved.
    """
    if not report.segment_traces:
        raise InputValueError("no block of this report is tough: there are no segments to draw")
    figure, panels = _panels(len(report.segment_traces))
    for axis, (block, counts) in zip(panels, report.segment_traces.items(), strict=True):
        traces = counts[report.settings.segments]
        for i, trace in enumerate(traces):
            axis.plot(trace.median, color=_shade(i, len(traces)), label=f"segment {i + 1}")
        whole = report.traces["noise"][block][report.best_guess(block)]
        color = sampler_style("jacobi").color
        axis.plot(whole.median, ":", color=color, label="all tokens at once", linewidth=2.2)
        _label(axis, f"block {block}: {len(traces)} segments, {report.num_tokens // len(traces)} tokens")
    _finish(figure, report.settings.traced)
    return figure


def _panels(count: int) -> tuple[Figure, Any]:
    figure = new_figure(_HEIGHT)
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _shade(number: int, count: int) -> Any:
    """The colour of one of `count` things in an order; the last still shows on white."""
    return ORDERED(0.85 * number / max(count - 1, 1))


def _label(axis: Axes, title: str) -> None:
    axis.set(yscale="log", xlabel="sweeps", xlim=(0, None), title=title)
    clear(axis)


def _finish(figure: Figure, samples: int) -> None:
    """Draws the vertical axis and the legend, which all panels share."""
    first = figure.axes[0]
    first.set_ylim(bottom=_LEAST)
    first.set_ylabel(f"largest |X$^{{(k)}}$ − X*|, median of {samples} samples")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper")
