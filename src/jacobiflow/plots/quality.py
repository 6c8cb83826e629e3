"""How good samples are: their certificates, and their distance from the original's against speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from jacobiflow.experiments.quality import WITHIN, Row
from jacobiflow.plots.labels import Label, place_labels
from jacobiflow.plots.style import (
    FAINT,
    INK,
    PAPER,
    TOUGH,
    clear,
    escape,
    new_figure,
    plain_ticks,
    sampler_style,
    styled,
)

_FEW = 8  # bins that all have their edges labelled


@styled
def certificate_figure(histogram: Mapping[str, Any], tolerance: float | None) -> Figure:
    """Samples by their certificate, from `jacobiflow.evaluation.certificate_histogram`, on a logarithmic axis.

    Bars have the widths of their bins, and heights of samples per factor of 10, so that areas are numbers of samples;
    these are written on the bars. A line marks the tolerance. Certificates of 0, and those that are not finite, have a
    bar each beyond the other bars and the line: 0 on the left, not finite on the right.
    """
    edges = list(histogram["edges"]) or [tolerance or 1.0]
    bars = list(zip(edges, edges[1:], histogram["counts"], strict=False))
    ticks = _edge_ticks(edges) if bars else {}
    step = 10 ** max(0.3, math.log10(edges[-1] / edges[0]) / 12)  # the width of a bar beyond the ends
    least, most = min(edges[0], tolerance or edges[0]), max(edges[-1], tolerance or edges[-1])
    if histogram["zero"]:
        bars.append((least / step**2, least / step, histogram["zero"]))
        ticks[least / step**1.5] = "0"
    if histogram["infinite"]:
        bars.append((most * step, most * step**2, histogram["infinite"]))
        ticks[most * step**1.5] = "not finite"
    figure = new_figure(3.4)
    axis = figure.subplots()
    axis.set_xscale("log")
    for low, high, count in bars:
        density = count / math.log10(high / low)
        axis.bar(low, density, high - low, align="edge", color=TOUGH, edgecolor=PAPER, linewidth=0.5)
        axis.annotate(
            f"{count:,}", (math.sqrt(low * high), density), xytext=(0, 2), textcoords="offset points", ha="center",
            rotation=0 if len(bars) <= 2 * _FEW else 90,
        )  # fmt: skip
    shown = [end for low, high, _ in bars for end in (low, high)] + ([tolerance] if tolerance else [])
    axis.set_xlim(min(shown) / step, max(shown) * step)
    axis.margins(y=0.15)
    if tolerance:
        axis.axvline(tolerance, color=INK, linestyle="--", linewidth=1.2)
        axis.annotate(
            f"tolerance {tolerance:g}", (tolerance, 1), xycoords=axis.get_xaxis_transform(), xytext=(4, -2),
            textcoords="offset points", va="top",
        )  # fmt: skip
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10), integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set(ylabel="samples per factor of 10", xlabel="certificate: the largest residual |g(x) − x| of a sample")
    clear(axis, grid=False)
    return figure


def _edge_ticks(edges: Sequence[float]) -> dict[float, str]:
    """Labels of the edges; where there are many, of some of the powers of ten between them."""
    if len(edges) <= _FEW + 1:
        return {edge: f"{edge:g}" for edge in edges}
    first, last = math.ceil(math.log10(edges[0])), math.floor(math.log10(edges[-1]))
    return {10.0**power: f"$10^{{{power}}}$" for power in range(first, last + 1, -(-(last - first + 1) // _FEW))}


@styled
def comparison_figure(rows: Sequence[Row], distance: str) -> Figure:
    """How far each strategy's distance is from the original's, against how many times it is as fast.

    `distance` is the name of the distance. Names are written beside their points. Below 0.1% the vertical axis is
    linear; rows within 1% are filled.
    """
    figure = new_figure(5.6)
    axis = figure.subplots()
    within = 100 * WITHIN
    axis.axhspan(-within, within, color=FAINT, alpha=0.5, linewidth=0)
    axis.axhline(0, color=INK, linewidth=0.6)
    for row in rows:
        style = sampler_style(row.name)
        axis.plot(
            row.rate, 100 * row.relative, color=style.color, marker=style.marker, linestyle="",
            fillstyle="full" if row.within else "none",
        )  # fmt: skip
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xscale("log")
    axis.margins(x=0.15, y=0.08)
    plain_ticks(axis.xaxis)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axis.set(xlabel="times as fast as the original's loop", ylabel=f"{distance} above the original's")
    clear(axis)
    place_labels(
        axis,
        [Label(escape(row.name), [(row.rate, 100 * row.relative)], sampler_style(row.name).color) for row in rows],
    )
    return figure
