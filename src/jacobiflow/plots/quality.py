"""How good samples are: their certificates, and their distance from the original's against speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from jacobiflow.experiments.quality import WITHIN, Row
from jacobiflow.plots.style import BLACK, BLUE, GREEN, clear, escape, plain_ticks, sampler_style

_FEW = 8  # bins that all have their edges labelled


def certificate_figure(histogram: Mapping[str, Any], tolerance: float | None) -> Figure:
    """Samples by their certificate, from `jacobiflow.evaluation.certificate_histogram`, on a logarithmic axis.

    Certificates of 0, and those that are not finite, have a bar each beyond the ends of the axis. A line marks the
    tolerance.
    """
    edges = list(histogram["edges"]) or [1.0]
    bars = list(zip(edges, edges[1:], histogram["counts"], strict=False))
    ticks = _edge_ticks(edges) if bars else {}
    step = 10 ** max(0.3, math.log10(edges[-1] / edges[0]) / 12)  # the width of a bar beyond the ends
    if histogram["zero"]:
        bars.append((edges[0] / step**2, edges[0] / step, histogram["zero"]))
        ticks[edges[0] / step**1.5] = "0"
    if histogram["infinite"]:
        bars.append((edges[-1] * step, edges[-1] * step**2, histogram["infinite"]))
        ticks[edges[-1] * step**1.5] = "not finite"
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.set_xscale("log")
    for low, high, count in bars:
        axis.bar(low, count, high - low, align="edge", color=BLUE, edgecolor="white", linewidth=0.5)
        axis.annotate(
            f"{count:,}", (math.sqrt(low * high), count), xytext=(0, 2), textcoords="offset points", ha="center",
            fontsize=8 if len(bars) <= _FEW else 6,
        )  # fmt: skip
    shown = [end for low, high, _ in bars for end in (low, high)] + ([tolerance] if tolerance else [])
    axis.set_xlim(min(shown) / step, max(shown) * step)
    if tolerance:
        axis.axvline(tolerance, color=BLACK, linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
        figure.legend(loc="outside upper right", frameon=False, fontsize=8)
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(MaxNLocator(steps=(1, 2, 5, 10), integer=True))
    axis.set(ylabel="samples", xlabel="certificate, the largest residual |g(x) - x| of a sample")
    clear(axis, grid=False)
    return figure


def _edge_ticks(edges: Sequence[float]) -> dict[float, str]:
    """Labels of the edges; where there are many, of some of the powers of ten between them."""
    if len(edges) <= _FEW + 1:
        return {edge: f"{edge:g}" for edge in edges}
    first, last = math.ceil(math.log10(edges[0])), math.floor(math.log10(edges[-1]))
    return {10.0**power: f"$10^{{{power}}}$" for power in range(first, last + 1, -(-(last - first + 1) // _FEW))}


def comparison_figure(rows: Sequence[Row], distance: str) -> Figure:
    """How far each strategy's distance is from the original's, against how many times it is as fast.

    `distance` is the name of the distance. Rows are numbered in their order. Below 0.1% the vertical axis is linear;
    rows within 1% are filled.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    within = 100 * WITHIN
    axis.axhspan(-within, within, color=GREEN, alpha=0.12, linewidth=0)
    axis.axhline(0, color=BLACK, linewidth=0.6)
    for number, row in enumerate(rows, 1):
        _number(axis, number, row)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    plain_ticks(axis.xaxis)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axis.set(xlabel="times as fast as the original's loop", ylabel=f"{distance} above the original's")
    clear(axis)
    return figure


def _number(axis: Axes, number: int, row: Row) -> None:
    point, style = (row.rate, 100 * row.relative), sampler_style(row.name)
    axis.plot(
        *point, color=style.color, marker=style.marker, linestyle="", fillstyle="full" if row.within else "none",
        label=f"{number}  {escape(row.name)}",
    )  # fmt: skip
    axis.annotate(str(number), point, xytext=(4, 3), textcoords="offset points", fontsize=7, color=style.color)
