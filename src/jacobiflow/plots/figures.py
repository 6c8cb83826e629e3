"""The figure of a benchmark: errors of strategies against their time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobiflow.comparison.compare import ENCODING_PASS, Comparison
from jacobiflow.plots.style import (
    FONT_SIZE,
    INK,
    OTHER,
    SAMPLERS,
    Style,
    clear,
    new_figure,
    plain_ticks,
    sampler_style,
    styled,
)

_CAPTION = 28  # characters on a line of the legend of a benchmark
_COLUMNS = 2  # of panels, and of that legend
_MARKERS = [style.marker for style in (*SAMPLERS.values(), OTHER)]


@styled
def bench_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draws the largest error against seconds: a panel for each batch size, a marker for each strategy.

    A bar goes from the fastest to the slowest round. Vertical lines are the encoding pass, which no solver beats, and
    the baselines, which are exact. Errors that are not finite are left out.
    """
    baselines = (ENCODING_PASS, *reversed(comparisons[0].baselines))
    styles = _distinct_styles(row.strategy for comparison in comparisons for row in comparison.candidates)
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
            seconds = comparison.encoding_pass if name == ENCODING_PASS else comparison.result(name).seconds
            color = INK if name == ENCODING_PASS else sampler_style(name).color
            handles[name] = axis.axvline(seconds.median, color=color, linestyle=line, linewidth=1.2)
        for row in comparison.candidates:
            style, seconds = styles[row.strategy], row.seconds
            handles[row.strategy] = axis.errorbar(
                seconds.median, row.error.max,
                xerr=[[seconds.median - seconds.min], [seconds.max - seconds.median]],
                color=style.color, marker=style.marker, linestyle="", elinewidth=1.2, clip_on=False,
            )  # fmt: skip
        axis.set_title(f"batch size {comparison.batch_size}")
        _label_seconds(axis)
    # Logarithmic from the least error on, with 0 below.
    errors = [row.error.max for comparison in comparisons for row in comparison.candidates]
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
