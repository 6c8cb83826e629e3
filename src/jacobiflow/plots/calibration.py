"""Curves of a calibration report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
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
    figure = new_figure(_HEIGHT)
    panels = figure.subplots(1, len(report.traces), sharey=True, squeeze=False)[0]
    tough = report.tough_blocks if report.components else ()
    for axis, (start, rows) in zip(panels, report.traces.items(), strict=True):
        for block, row in enumerate(rows):
            trace, heavy, color = (
                row[report.best_guess(block)],
                block in tough,
                _shade(len(rows) - 1 - block, len(rows)),
            )
            label = f"block {block}{' (tough)' if heavy else ''}"
            _curve(axis, trace.median, color, label, width=2.6 if heavy else 1.4)
            if heavy:
                _curve(axis, trace.largest, color, f"block {block}, slowest sample", width=1.6, style=":")
        _label(axis, f"from {_STARTS[start]}{', guided' if report.settings.guidance else ''}")
    _finish(figure, report.settings.traced)
    return figure


@styled
def segments_figure(report: Report) -> Figure:
    """Draws the distance to the solution X* by sweep in each segment of the tough blocks (Figure 5 of the paper).

    Lines are the median sample of fresh latents, from the block's best guess by IGM, with the segments before solved.

    Raises:
        ValueError: If no block is tough.
    """
    if not report.segment_traces:
        raise InputValueError("no block of this report is tough: there are no segments to draw")
    figure = new_figure(_HEIGHT)
    panels = figure.subplots(1, len(report.segment_traces), sharey=True, squeeze=False)[0]
    for axis, (block, counts) in zip(panels, report.segment_traces.items(), strict=True):
        traces = counts[report.settings.segments]
        for i, trace in enumerate(traces):
            _curve(axis, trace.median, _shade(i, len(traces)), f"segment {i + 1}", width=1.6)
        whole = report.traces["noise"][block][report.best_guess(block)]
        _curve(axis, whole.median, sampler_style("jacobi").color, "all tokens at once", width=2.2, style=":")
        _label(axis, f"block {block}: {len(traces)} segments, {report.num_tokens // len(traces)} tokens")
    _finish(figure, report.settings.traced)
    return figure


def _shade(number: int, count: int) -> str:
    """The colour of one of `count` things in an order; the last still shows on white."""
    return str(to_hex(ORDERED(0.85 * number / max(count - 1, 1))))


def _curve(axis: Axes, distances: Sequence[float], color: Any, label: str, width: float, style: str = "-") -> None:
    """Draws distances by sweep, until they are rounding."""
    # Rounding may rise above the axis once more; that is no reason to draw a hundred sweeps of it.
    high = max((k for k, distance in enumerate(distances) if distance >= 3 * _LEAST), default=0)
    end = next((k for k in range(high, len(distances)) if distances[k] < _LEAST), len(distances) - 1)
    axis.plot(distances[: end + 1], style, color=color, label=label, linewidth=width)


def _label(axis: Axes, title: str) -> None:
    axis.update_datalim([(0, 1)])  # a logarithmic axis needs a positive number: curves may be 0 throughout
    axis.set(yscale="log", xlabel="sweeps", xlim=(0, None))
    axis.set_title(title)
    clear(axis)


def _finish(figure: Figure, samples: int) -> None:
    """Draws the vertical axis and the legend, which all panels share."""
    first = figure.axes[0]
    first.set_ylim(bottom=_LEAST)
    first.set_ylabel(f"largest |X$^{{(k)}}$ − X*|, median of {samples} samples")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper")
