"""Errors of strategies against their time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from jacobiflow.comparison import ENCODING_PASS, Comparison
from jacobiflow.plots.style import (
    FONT_SIZE,
    INK,
    Style,
    clear,
    distinct_styles,
    escape,
    new_figure,
    plain_ticks,
    sampler_style,
    styled,
)

_CAPTION = 28  # characters on a line of the legend
_COLUMNS = 3  # of the legend


@styled
def bench_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draws the largest error against seconds: a panel for each batch size, a marker for each strategy.

    A bar goes from the fastest to the slowest round. Vertical lines are the encoding pass, which no solver beats, and
    the baselines, which are exact. Errors of 0, and those that are not finite, are at the edges, with labels.
    """
    baselines = (ENCODING_PASS, *reversed(comparisons[0].baselines))
    styles = distinct_styles(row.strategy for comparison in comparisons for row in comparison.others)
    captions = [textwrap.fill(escape(name), _CAPTION) for name in (*baselines, *styles)]
    columns = min(len(comparisons), 3)
    lines = -(-len(comparisons) // columns)
    rows = -(-len(captions) // _COLUMNS)
    most = max(caption.count("\n") + 1 for caption in captions)
    figure = new_figure(2.8 * lines + 0.6 + rows * (most + 0.6) * FONT_SIZE / 60)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    ticks = _error_ticks([row.error.max for comparison in comparisons for row in comparison.others])
    handles: dict[str, Any] = {}
    for axis, comparison in zip(panels, comparisons, strict=False):
        for name, line in zip(baselines, (":", "--", "-."), strict=False):
            seconds = comparison.floor if name == ENCODING_PASS else comparison.row(name).seconds
            color = INK if name == ENCODING_PASS else sampler_style(name).color
            handles[name] = axis.axvline(seconds.median, color=color, linestyle=line, linewidth=1.2)
        handles |= _markers(axis, comparison, styles, min(ticks), max(ticks))
        _label(axis, f"batch size {comparison.batch_size}", ticks)
    for axis in panels[len(comparisons) :]:
        axis.set_axis_off()
    figure.supxlabel("seconds for the batch: median, fastest and slowest round")
    figure.supylabel("largest error of an entry of the images")
    figure.legend(list(handles.values()), captions, loc="outside upper center", ncols=_COLUMNS)
    return figure


def _error_ticks(errors: Sequence[float]) -> dict[float, str]:
    """Powers of ten around the errors, with labels; the edges stand for 0 and for errors that are not finite."""
    decades = [math.log10(error) for error in errors if 0 < error < math.inf] or [-3.0]
    low, high = math.floor(min(decades)) - 1, math.ceil(max(decades)) + 1
    powers = [low, *range(low + 1, high, -(-(high - low) // 8)), high]
    ticks = {10.0**power: f"$10^{{{power}}}$" for power in powers}
    if 0.0 in errors:
        ticks[10.0**low] = "0"
    if not all(map(math.isfinite, errors)):
        ticks[10.0**high] = "not finite"
    return ticks


def _markers(axis: Axes, comparison: Comparison, styles: dict[str, Style], low: float, high: float) -> dict[str, Any]:
    """Draws the strategies, their errors limited to [low, high]; returns the markers by name."""
    handles = {}
    for row in comparison.others:
        style, seconds = styles[row.strategy], row.seconds
        handles[row.strategy] = axis.errorbar(
            seconds.median, min(max(row.error.max, low), high),
            xerr=[[seconds.median - seconds.min], [seconds.max - seconds.median]],
            color=style.color, marker=style.marker, fillstyle=style.fillstyle,
            linestyle="", elinewidth=1.2, clip_on=False,
        )  # fmt: skip
    return handles


def _label(axis: Axes, title: str, ticks: dict[float, str]) -> None:
    axis.set(xscale="log", yscale="log", ylim=(min(ticks), max(ticks)))
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    between = (2, 5) if high < 30 * low else (3,) if high < 1000 * low else ()
    plain_ticks(axis.xaxis, (1, *between))
    axis.yaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.yaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title(title)
    clear(axis)
