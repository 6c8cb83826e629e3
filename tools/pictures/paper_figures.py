"""Draws the paper's Figures 2, 3, 4, 5 and 7 for a model: `python -m tools.pictures.paper_figures MODEL`.

Reads the model's report, as `jacobiflow calibrate` writes it. Samples have no guidance and no certificates. Writes
MODEL-convergence.png (Figure 2), -sampling.png (3), -guesses.png (4), -segments.png (5) and -comparison.png (7).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import jacobiflow as jf
from benchmarks import FIGURES
from benchmarks.lib.results import parser
from jacobiflow.calibration import CalibrationReport, gs_jacobi_notation
from jacobiflow.fixed_point import Latent, Solver, Stopping, Whole, Zeros
from jacobiflow.models.contexts import class_names
from jacobiflow.models.flow import Flow
from jacobiflow.plots import comparison_sheet, rows_sheet, sampler_style, save_png
from jacobiflow.plots.style import new_figure, simplify_axes, use_style
from tools.pictures.palette import ORDERED

IMAGES, SHOWN = 10, 4
TOLERANCE = 1e-2
HEIGHT = 4.2  # inches, of figures of a report
LEAST = 1e-5  # smaller distances are rounding
EXACT = "token by token, exact"
STARTS = {"images": "latents of images", "noise": "fresh latents"}


def draw_figures(flow: Flow, report: CalibrationReport, out: Path, name: str, strategy: str | None = None) -> None:
    """Writes all figures; `strategy` is compared with the exact loop, by default the report's own proposal."""
    out.mkdir(parents=True, exist_ok=True)
    save_png(convergence_figure(report), out / f"{name}-convergence.png")
    if report.segment_curves:
        save_png(segments_figure(report), out / f"{name}-segments.png")
    notation = strategy or gs_jacobi_notation(report, TOLERANCE)
    labels = torch.arange(IMAGES) % flow.config.num_classes if flow.config.num_classes else None
    sample = partial(jf.sample, flow.guided(report.settings.guidance), IMAGES, labels, certify=False)
    denoise = float(flow.config.noise_std > 0)
    sequential = sample(strategy="sequential", settings=jf.SamplingSettings(denoise=denoise), return_intermediates=True)
    steps = sequential.intermediates or ()
    save_png(intermediates_sheet([images[:SHOWN] for images in steps], denoise > 0), out / f"{name}-sampling.png")
    exact = steps[-2] if denoise else sequential.images
    columns = class_names(labels, flow.classes)
    rows = []
    for case, plan in strategies_of(report, notation).items():
        images = sample(strategy=plan, settings=None).images
        error = (images - exact).abs()
        rows.append((f"{case}: error max {error.max():.1e}, mean {error.mean():.1e}", images))
    save_png(rows_sheet([*rows, (EXACT, exact)], columns=columns), out / f"{name}-guesses.png")
    other = sample(strategy=jf.Strategy.parse(notation, report), settings=jf.SamplingSettings(denoise=denoise))
    sheet = comparison_sheet(sequential.images, other.images, (EXACT, f"GS-Jacobi {notation}"), columns=columns)
    save_png(sheet, out / f"{name}-comparison.png")


@use_style
def convergence_figure(report: CalibrationReport) -> Figure:
    """Draws the distance to the solution X* by sweep, from each block's best guess by IGM (Figure 2 of the paper).

    Lines are the median sample; the slowest one of a tough block is dotted. There is a panel for each start in the
    report.
    """
    figure = new_figure(HEIGHT)
    panels = figure.subplots(1, len(report.curves), sharey=True, squeeze=False)[0]
    tough = report.tough_blocks if report.components else ()
    for axis, (start, rows) in zip(panels, report.curves.items(), strict=True):
        for block, row in enumerate(rows):
            curve, color = row[report.best_guess(block)], shade(len(rows) - 1 - block, len(rows))
            if block in tough:
                axis.plot(curve.median, color=color, label=f"block {block} (tough)", linewidth=2.6)
                axis.plot(curve.largest, ":", color=color, label=f"block {block}, slowest sample")
            else:
                axis.plot(curve.median, color=color, label=f"block {block}", linewidth=1.4)
        axis.set_title(f"from {STARTS[start]}{', guided' if report.settings.guidance else ''}")
    label_sweeps(figure, report)
    return figure


@use_style
def segments_figure(report: CalibrationReport) -> Figure:
    """Draws the distance to the solution X* by sweep in each segment of the tough blocks (Figure 5 of the paper).

    Lines are the median sample of fresh latents, from the block's best guess by IGM, with the segments before solved.
    """
    figure = new_figure(HEIGHT)
    panels = figure.subplots(1, len(report.segment_curves), sharey=True, squeeze=False)[0]
    for axis, (block, counts) in zip(panels, report.segment_curves.items(), strict=True):
        curves = counts[report.settings.segments]
        for i, curve in enumerate(curves):
            axis.plot(curve.median, color=shade(i, len(curves)), label=f"segment {i + 1}")
        whole = report.curves["noise"][block][report.best_guess(block)]
        color = sampler_style("jacobi").color
        axis.plot(whole.median, ":", color=color, label="all tokens at once", linewidth=2.2)
        axis.set_title(f"block {block}: {len(curves)} segments of {report.num_tokens // len(curves)} tokens")
    label_sweeps(figure, report)
    return figure


def shade(number: int, count: int) -> Any:
    """The colour of one of `count` things in an order; the last still shows on white."""
    return ORDERED(0.85 * number / max(count - 1, 1))


def label_sweeps(figure: Figure, report: CalibrationReport) -> None:
    """Labels the axes, and draws the legend that all panels share."""
    for axis in figure.axes:
        last = max(int((np.asarray(line.get_ydata(), float) > LEAST).sum()) for line in axis.get_lines())
        axis.set(yscale="log", xlabel="sweeps", xlim=(0, last), ylim=(LEAST, None))
        simplify_axes(axis)
    first = figure.axes[0]
    first.set_ylabel(f"largest |X$^{{(k)}}$ − X*|, median of {report.settings.num_convergence_samples} samples")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def intermediates_sheet(intermediates: Sequence[Float[Tensor, "n c h w"]], denoised: bool) -> Image.Image:
    """Draws `Samples.intermediates`, a row for each sample (Figure 3 of the paper).

    The first image is noise, and one follows for each block. `denoised` tells if the last one is denoised.
    """
    blocks = len(intermediates) - 1 - denoised
    columns = ["noise", *(f"block {i}" for i in reversed(range(blocks))), *["denoised"] * denoised]
    rows = torch.stack(list(intermediates), dim=1)
    return rows_sheet([(f"sample {i}", row) for i, row in enumerate(rows)], columns)


def strategies_of(report: CalibrationReport, notation: str) -> dict[str, jf.Strategy]:
    """Guesses and sweeps: every guess at a third of the sweeps that the slowest block takes, then more."""
    most = max(1, *report.slowest_sweeps("noise", TOLERANCE))
    few, more = max(1, most // 3), max(1, 2 * most // 3)
    by_igm = {f"guess by IGM, Jacobi-{j}": jf.Strategy.parse(f"Jacobi-{j}", report) for j in (few, more, most)}
    stopping, num = Stopping(few), report.num_blocks
    return {
        f"guess 0, Jacobi-{few}": jf.Strategy.uniform(Solver(Whole(), Zeros(), stopping), num, tolerance=None),
        f"guess z, Jacobi-{few}": jf.Strategy.uniform(Solver(Whole(), Latent(), stopping), num, tolerance=None),
        **by_igm,
        f"guess by IGM, GS-Jacobi {notation}": jf.Strategy.parse(notation, report),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a bundled name, or a model folder with a report.json")
    arguments.add_argument("--strategy", help="compared with the exact loop; default: the report's own proposal")
    options = arguments.parse_args()
    flow = jf.load(options.model)
    path = jf.find_report(flow)
    if path is None:
        raise SystemExit(f"{options.model}: has no report.json; make one with jacobiflow calibrate")
    draw_figures(flow, CalibrationReport.load(path), FIGURES, Path(options.model).name, options.strategy)


if __name__ == "__main__":
    main()
