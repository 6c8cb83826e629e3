"""Pictures: sheets of samples, curves of a calibration report, and timings."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jacobiflow.calibration import Report
from jacobiflow.data import quantize
from jacobiflow.experiments.quality import WITHIN, Row
from jacobiflow.experiments.speed import ENCODING_PASS, Comparison
from jacobiflow.files import write_atomically

# Okabe and Ito's colours, told apart by colour-blind readers.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b8a800")
ORDERED = matplotlib.colormaps["viridis"]
_MARKERS = "osD^vP*X"
_CAPTION = 22  # pixels
_MOST_FLAT_LABELS = 5  # more bars have theirs upright
_LEAST = 1e-5  # below it, a distance is rounding
_STARTS = {"images": "latents that encode images", "noise": "fresh latents"}


def image_grid(images: Float[Tensor, "n c h w"], columns: int, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Images, nominally in [-1, 1], in rows of `columns`, each pixel drawn `zoom` wide; a NaN is drawn black."""
    pixels = quantize(images.nan_to_num(nan=-1.0)).permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1] * zoom, pixels.shape[2] * zoom
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (gap + i // columns * (height + gap)), (gap + i % columns * (width + gap))
        sheet[top : top + height, left : left + width] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).convert("RGB")


def comparison_sheet(
    reference: Float[Tensor, "n c h w"], images: Float[Tensor, "n c h w"], names: tuple[str, str], zoom: int = 2
) -> Image.Image:
    """Three panels: `reference`, `images`, and their difference, its largest entry drawn white (Figure 7 of the paper).

    `names` are the captions of the first two; the third's gives the largest difference. Rows hold at most 20 images.
    """
    difference = (images - reference).abs()
    largest = float(difference.nan_to_num().max())
    shown = difference / max(largest, 1e-30) * 2 - 1
    captions = (*names, f"difference; white is {largest:.1e}")
    return rows_sheet(list(zip(captions, (reference, images, shown), strict=True)), zoom)


def rows_sheet(rows: Sequence[tuple[str, Float[Tensor, "n c h w"]]], zoom: int = 2) -> Image.Image:
    """Rows of images under each other, each below its caption (Figure 4 of the paper); at most 20 images a line."""
    grids = [image_grid(images, min(len(images), 20), zoom) for _, images in rows]
    font = ImageFont.load_default(size=14)
    width = max(*(grid.width for grid in grids), *(int(font.getlength(caption)) + 8 for caption, _ in rows))
    sheet = Image.new("RGB", (width, sum(grid.height + _CAPTION for grid in grids)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for grid, (caption, _) in zip(grids, rows, strict=True):
        draw.text((4, top + 3), caption, fill="black", font=font)
        sheet.paste(grid, (0, top + _CAPTION))
        top += grid.height + _CAPTION
    return sheet


def trace_sheet(trace: Sequence[Float[Tensor, "n c h w"]], denoised: bool, zoom: int = 2) -> Image.Image:
    """A sample a line: noise, the image after each block in sampling order, and `denoised` (Figure 3 of the paper).

    `trace` is `Samples.trace`.
    """
    blocks = len(trace) - 1 - denoised
    captions = ["noise", *(f"block {i}" for i in reversed(range(blocks))), *["denoised"] * denoised]
    grid = image_grid(torch.stack(list(trace), dim=1).flatten(0, 1), len(trace), zoom)
    sheet = Image.new("RGB", (grid.width, grid.height + _CAPTION), "white")
    sheet.paste(grid, (0, _CAPTION))
    draw, step = ImageDraw.Draw(sheet), grid.width / len(trace)
    font = ImageFont.load_default(size=min(14, step / 5.5))
    for column, caption in enumerate(captions):
        draw.text(((column + 0.5) * step, _CAPTION / 2), caption, fill="black", font=font, anchor="mm")
    return sheet


def convergence_figure(report: Report) -> Figure:
    """Distance to X* sweep by sweep, all blocks, from each block's best guess by IGM (Figure 2 of the paper).

    Lines are the median sample; the slowest one of a tough block is dotted. One panel for each start in the report.
    """
    figure = Figure(figsize=(5.6 * len(report.traces), 4.0), layout="constrained")
    panels = figure.subplots(1, len(report.traces), sharey=True, squeeze=False)[0]
    tough = report.tough_blocks if report.components else ()
    for axis, (start, rows) in zip(panels, report.traces.items(), strict=True):
        for block, row in enumerate(rows):
            trace, heavy, color = row[report.best_guess(block)], block in tough, COLORS[block % len(COLORS)]
            label = f"block {block}{' (tough)' if heavy else ''}"
            _curve(axis, trace.median, color, label, width=2.6 if heavy else 1.4)
            if heavy:
                _curve(axis, trace.largest, color, f"block {block}, slowest sample", width=1.6, style=":")
        title = f"from {_STARTS[start]}{', guided' if report.settings.guidance else ''}"
        _dress(axis, f"{title}: {report.settings.traced} samples")
    panels[0].set_ylabel("largest |X$^{(k)}$ − X*| of the median sample")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure


def segments_figure(report: Report) -> Figure:
    """Distance to X* sweep by sweep in each segment of the tough blocks (Figure 5 of the paper).

    The segments before it are solved; fresh latents, median sample, from the block's best guess by IGM.

    **Raises** `ValueError` where no block is tough.
    """
    if not report.segment_traces:
        raise ValueError("no block of this report is tough: there are no segments to draw")
    figure = Figure(figsize=(5.6 * len(report.segment_traces), 4.0), layout="constrained")
    panels = figure.subplots(1, len(report.segment_traces), sharey=True, squeeze=False)[0]
    for axis, (block, counts) in zip(panels, report.segment_traces.items(), strict=True):
        traces = counts[report.settings.segments]
        for i, trace in enumerate(traces):
            _curve(axis, trace.median, ORDERED(i / len(traces)), f"segment {i + 1}", width=1.6)
        whole = report.traces["noise"][block][report.best_guess(block)]
        _curve(axis, whole.median, "black", "all tokens at once", width=1.6, style=":")
        _dress(axis, f"block {block} in {len(traces)} segments of some {report.num_tokens // len(traces)} tokens")
        axis.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("largest |X$^{(k)}$ − X*| of the median sample")
    return figure


def bench_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Largest error against seconds, a panel for each batch size, a marker for each strategy, both axes logarithmic.

    A bar goes from the fastest to the slowest round. Vertical lines are the encoding pass, which is the floor, and the
    two baselines, which are exact. Errors of 0, and those that are not finite, are drawn at the edges, which say so.
    """
    columns = 2 if len(comparisons) == 4 else min(len(comparisons), 3)
    lines = -(-len(comparisons) // columns)
    names = list(dict.fromkeys(row.strategy for comparison in comparisons for row in comparison.others))
    lines_of = (ENCODING_PASS, *reversed(comparisons[0].baselines))
    styles = dict(zip(lines_of, (":", "--", "-."), strict=False))
    captions = [textwrap.fill(name.replace("$", r"\$"), 28) for name in (*styles, *names)]
    legend = 0.3 + 0.2 * sum(caption.count("\n") + 1 for caption in captions)  # inches
    figure = Figure(figsize=(3.6 * columns + 2.4, max(3.6 * lines, legend)), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    errors = [row.error.max for comparison in comparisons for row in comparison.others]
    decades = [math.log10(error) for error in errors if 0 < error < math.inf] or [-3.0]
    low, high = math.floor(min(decades)) - 1, math.ceil(max(decades)) + 1
    powers = [low, *range(low + 1, high, -(-(high - low) // 8)), high]
    ticks = {10.0**power: f"$10^{{{power}}}$" for power in powers}
    ticks[10.0**low] = "0" if 0.0 in errors else ticks[10.0**low]
    ticks[10.0**high] = ticks[10.0**high] if all(map(math.isfinite, errors)) else "not finite"
    shown: dict[str, Any] = {}
    for axis, comparison in zip(panels, comparisons, strict=False):
        for name, style in styles.items():
            seconds = comparison.floor if name == ENCODING_PASS else comparison.row(name).seconds
            shown[name] = axis.axvline(seconds.median, color="black", linestyle=style, linewidth=1.2)
        for row in comparison.others:
            i, seconds = names.index(row.strategy), row.seconds
            shown[row.strategy] = axis.errorbar(
                seconds.median, min(max(row.error.max, 10.0**low), 10.0**high),
                xerr=[[seconds.median - seconds.min], [seconds.max - seconds.median]],
                color=COLORS[i % len(COLORS)], marker=_MARKERS[(i + i // len(COLORS)) % len(_MARKERS)],
                linestyle="", markersize=7, elinewidth=1.2, clip_on=False,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", ylim=(10.0**low, 10.0**high))
        axis.margins(x=0.08)
        left, right = axis.get_xlim()
        between = (2, 5) if right < 30 * left else (3,) if right < 1000 * left else ()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, *between)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(FixedLocator(list(ticks)))
        axis.yaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(f"batch size {comparison.batch_size}", fontsize=10)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[len(comparisons) :]:
        axis.set_axis_off()
    figure.supxlabel("seconds for the batch: median, fastest and slowest round", fontsize=10)
    figure.supylabel("largest error of an entry of the images", fontsize=10)
    figure.legend(list(shown.values()), captions, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def certificate_figure(histogram: Mapping[str, Any], tolerance: float | None) -> Figure:
    """Samples by the size of their certificate, from `jacobiflow.evaluation.certificate_histogram`."""
    counts = list(histogram["counts"])
    names = [f"{low:g} to {high:g}" for low, high in pairwise(histogram["edges"])]
    if histogram["zero"]:
        names, counts = ["0", *names], [histogram["zero"], *counts]
    if histogram["infinite"]:
        names, counts = [*names, "lost"], [*counts, histogram["infinite"]]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(names, counts, color=COLORS[0], width=0.7)
    axis.bar_label(bars, labels=[f"{count:,}" for count in counts], fontsize=8)
    asked = "" if tolerance is None else f"; tolerance asked for: {tolerance:g}"
    axis.set(ylabel="samples", xlabel=f"certificate, the largest residual |g(x) - x| of a sample{asked}")
    axis.tick_params(axis="x", labelsize=8, rotation=0 if len(names) <= _MOST_FLAT_LABELS else 90)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def comparison_figure(rows: Sequence[Row], distance: str) -> Figure:
    """How far each strategy's distance is from the original's, against how many times it is as fast.

    `distance` is its name. Rows are numbered, in their order. Below 0.1% the axis is linear; what is within 1% is
    filled.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    within = 100 * WITHIN
    axis.axhspan(-within, within, color="#009e73", alpha=0.12, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.6)
    for number, row in enumerate(rows, 1):
        point, color = (row.rate, 100 * row.relative), _color(row.name)
        style = "full" if row.within else "none"
        axis.plot(*point, "o", color=color, fillstyle=style, label=f"{number}  {row.name}".replace("$", r"\$"))
        axis.annotate(str(number), point, xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axis.set(xlabel="times as fast as the original's loop", ylabel=f"{distance} above the original's")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _color(name: str) -> str:
    """One for auto, one for the paper's strategies, one for all others."""
    if name.startswith("auto"):
        return COLORS[0]
    return COLORS[1] if name.startswith(("[", "Jacobi")) else COLORS[6]


def save_png(image: Image.Image | Figure, path: str | Path) -> None:
    """Write a PNG; the file appears whole or not at all."""
    data = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(data, format="png", dpi=130)
    else:
        image.save(data, "PNG")
    write_atomically(path, data.getvalue())


def _curve(axis: Axes, distances: Sequence[float], color: Any, label: str, width: float, style: str = "-") -> None:
    # rounding may leap above the axis once more, which is no reason to draw a hundred sweeps of it
    high = max((k for k, distance in enumerate(distances) if distance >= 3 * _LEAST), default=0)
    end = next((k for k in range(high, len(distances)) if distances[k] < _LEAST), len(distances) - 1)
    axis.plot(distances[: end + 1], style, color=color, label=label, linewidth=width)


def _dress(axis: Axes, title: str) -> None:
    axis.update_datalim([(0, 1)])  # a logarithmic axis needs a positive number: curves may be 0 throughout
    axis.set(yscale="log", xlabel="sweeps", xlim=(0, None), ylim=(_LEAST, None))
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
