"""The figure of a benchmark: errors of strategies against their time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobiflow.comparison.compare import ENCODING_PASS, Comparison
from jacobiflow.data.grid import TEXT_COLOR
from jacobiflow.plots.style import (
    FONT_SIZE,
    OTHER_STYLE,
    SAMPLER_STYLES,
    Style,
    new_figure,
    plain_ticks,
    sampler_style,
    simplify_axes,
    use_style,
)

_CAPTION_WIDTH = 28  # characters on a line of the legend
_COLUMNS = 2  # The legend has two columns.
_MARKERS = [style.marker for style in (*SAMPLER_STYLES.values(), OTHER_STYLE)]


@use_style
def bench_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draws the largest error against seconds: a panel for each batch size, a marker for each strategy.

    A bar goes from the fastest to the slowest round. Vertical lines show the baselines, which are exact, and the
    encoding pass, which is faster than any solver. Errors that are not finite are left out.
    """
    baselines = (ENCODING_PASS, *reversed(comparisons[0].baselines))
    styles = _distinct_styles(result.strategy for each in comparisons for result in each.candidates)
    titles = map(comparisons[0].title, (*baselines, *styles))
    captions = [textwrap.fill(title.replace("$", r"\$"), _CAPTION_WIDTH) for title in titles]
    caption_lines = max(caption.count("\n") + 1 for caption in captions)
    legend_height = math.ceil(len(captions) / _COLUMNS) * (caption_lines + 0.6) * FONT_SIZE / 60  # inches
    figure = new_figure(2.2 * len(comparisons) + 0.6 + legend_height)
    panels = figure.subplots(len(comparisons), 1, sharey=True, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for axis, comparison in zip(panels, comparisons, strict=True):
        handles |= _draw_panel(axis, comparison, baselines, styles)
    _scale_errors(panels[0], [result.error.max for each in comparisons for result in each.candidates])
    figure.supxlabel("seconds for the batch: median, fastest and slowest round")
    figure.supylabel("largest error of an entry of x")
    figure.legend(list(handles.values()), captions, loc="outside upper center", ncols=_COLUMNS)
    return figure


def _draw_panel(
    axis: Axes, comparison: Comparison, baselines: Sequence[str], styles: Mapping[str, Style]
) -> dict[str, Any]:
    """Draws the panel of one batch size, and returns the legend's handles by name."""
    handles: dict[str, Any] = {}
    for name, linestyle in zip(baselines, (":", "--", "-."), strict=False):
        is_encoding = name == ENCODING_PASS
        seconds = comparison.encoding_pass if is_encoding else comparison.result(name).seconds
        color = TEXT_COLOR if is_encoding else sampler_style(name).color
        handles[name] = axis.axvline(seconds.median, color=color, linestyle=linestyle, linewidth=1.2)
    for result in comparison.candidates:
        style, seconds = styles[result.strategy], result.seconds
        handles[result.strategy] = axis.errorbar(
            seconds.median, result.error.max,
            xerr=[[seconds.median - seconds.min], [seconds.max - seconds.median]],
            color=style.color, marker=style.marker, linestyle="", elinewidth=1.2, clip_on=False,
        )  # fmt: skip
    axis.set_title(f"batch size {comparison.batch_size}")
    axis.set_xscale("log")
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    between = (2, 5) if high < 30 * low else (3,) if high < 1000 * low else ()
    plain_ticks(axis.xaxis, (1, *between))
    simplify_axes(axis)
    return handles


def _scale_errors(axis: Axes, errors: Sequence[float]) -> None:
    """Makes the axis of errors logarithmic from the smallest error on, with 0 at its end."""
    positive = [error for error in errors if 0 < error < math.inf] or [1e-3]
    axis.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(positive))), linscale=0.5)
    axis.set_ylim(0, 3 * max(positive))


def _distinct_styles(names: Iterable[str]) -> dict[str, Style]:
    """Gives each name the colour of `sampler_style`, and markers that differ within a colour."""
    styles: dict[str, Style] = {}
    for name in dict.fromkeys(names):
        color, marker = sampler_style(name)
        first = _MARKERS.index(marker)
        choices = [Style(color, marker) for marker in _MARKERS[first:] + _MARKERS[:first]]
        styles[name] = next((style for style in choices if style not in styles.values()), choices[0])
    return styles
