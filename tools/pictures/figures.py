"""Draws the figures of the method and of result files: `python -m tools.pictures.figures [NAME ...]`.

overview.png, partitions.png and front.gif show the method; error-against-time.png, regimes.png, masked-flows.png,
speed.png, training.png and alanine.png show result files. speed-dark.png is speed.png for README in the dark.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

import jacobiflow as jf
from benchmarks import FIGURES
from benchmarks.lib.results import Json, parser
from benchmarks.regimes import BF16_PASS, EXACT_LOOP, LOOP_IN_PYTORCH, PASS, in_passes
from jacobiflow.models.latents import draw_latents
from jacobiflow.plots import sampler_style, save_png
from jacobiflow.plots.style import TEXT_COLOR, new_figure, plain_ticks, simplify_axes, use_style
from tools.docs.render import format_speed_up, result, strategy
from tools.pictures.front import Recorder, readable, record, save_animation
from tools.pictures.palette import EASY_BLOCK, FINAL_TOKEN, ORDERED, OTHERS, TOUGH_BLOCK, WAITING_TOKEN

SWEPT = sampler_style("gs-jacobi").color
MODEL = "emoji-p2"
LUMINANCE = np.array([0.213, 0.715, 0.072])  # of red, green and blue, as CSS has them
ROUNDING = 1e-6  # Smaller errors are drawn here.
SAMPLE, LABEL = 10, 1  # a person of seed 0, whose number of sweeps is about the median of the first 20


@use_style
def partitions() -> Figure:
    """The tokens that each partition sweeps, sweep by sweep, in the tough block of `digits-p1`."""
    flow = jf.load("digits-p1")
    block = flow.blocks[-1]
    z = block.permutation(draw_latents(1, flow.config.num_tokens, flow.config.token_channels, seed=0))
    label = torch.tensor([3])
    tolerance = jf.Tolerance(1e-3)
    solvers = {
        "sequential": jf.Solver(jf.Sequential()),
        "Jacobi": jf.Solver(jf.Whole(), stopping=tolerance),
        "GS-Jacobi, 4 segments": jf.Solver(jf.Segments(4), stopping=tolerance),
        "window of 12": jf.Solver(jf.Window(12), stopping=tolerance),
    }
    colors = [sampler_style(name).color for name in solvers]
    figure = new_figure(5.2)
    axes = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axis, color, (name, solver) in zip(axes, colors, solvers.items(), strict=True):
        recorder = Recorder(block)
        solution = jf.solve(recorder, z, solver, label)
        raster = np.ones((flow.config.num_tokens, flow.config.num_tokens, 3))
        for row, (start, stop) in enumerate(recorder.runs):
            raster[row] = to_rgb(WAITING_TOKEN)
            raster[row, :start], raster[row, start:stop] = to_rgb(FINAL_TOKEN), to_rgb(color)
        axis.imshow(raster, interpolation="none", aspect="auto")
        count = f"{solution.sweeps} sweeps, {solution.token_evaluations} evaluations"
        axis.set_title(f"{name}:\n{count}", color=readable(color))
    for axis in axes[2:]:
        axis.set_xlabel("token")
    figure.supylabel("sweep")
    final, *colored, waiting = (Rectangle((0, 0), 1, 1, color=shade) for shade in (FINAL_TOKEN, *colors, WAITING_TOKEN))
    handles: list[Any] = [final, tuple(colored), waiting]
    figure.legend(
        handles, ["final", "swept", "waiting"], loc="outside lower center", ncols=3,
        handlelength=4, handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
    )  # fmt: skip
    return figure


@use_style
def overview() -> Figure:
    """Sampling: noise through the blocks, the tough one cut into segments (cf. Figures 1 and 6)."""
    figure = new_figure(3.8)
    figure.set_layout_engine("none")
    axis = figure.add_axes((0.01, 0, 0.98, 1))
    axis.set(xlim=(0, 22), ylim=(-1.4, 9.2))
    axis.axis("off")
    _chain(axis)
    _segments(axis)
    return figure


def _chain(axis: Axes) -> None:
    left, middle = 2.9, 6.75
    for number in reversed(range(8)):
        color, ink = (TOUGH_BLOCK, "white") if number == 7 else (EASY_BLOCK, TEXT_COLOR)
        axis.add_patch(FancyBboxPatch((left, 6.2), 1.3, 1.1, boxstyle="round,pad=0.05", fc=color, ec="none"))
        axis.text(left + 0.65, middle, str(number), ha="center", va="center", color=ink)
        _arrow(axis, (left - 0.75, middle), (left - 0.05, middle))
        left += 2.05
    _arrow(axis, (left - 0.75, middle), (left - 0.05, middle))
    axis.text(0, middle, "noise z", va="center", color=TEXT_COLOR)
    axis.text(left + 0.1, middle, "image x", va="center", color=TEXT_COLOR)
    axis.text(3.55, 7.8, "tough\nblock", ha="center", color=TEXT_COLOR)
    text = "easy blocks: all tokens at once, x ← g(x),\nuntil |g(x) − x| ≤ tolerance"
    axis.text(12.3, 7.8, text, ha="center", color=TEXT_COLOR)


def _segments(axis: Axes) -> None:
    axis.plot([2.9, 1.0], [6.1, 5.2], color=TOUGH_BLOCK, lw=0.8)
    axis.plot([4.2, 21.0], [6.1, 5.2], color=TOUGH_BLOCK, lw=0.8)
    for i, shade in enumerate((FINAL_TOKEN, SWEPT, WAITING_TOKEN, WAITING_TOKEN)):
        left = 1.0 + 5.0 * i
        for token in range(6):
            axis.add_patch(Rectangle((left + 0.75 * token, 2.6), 0.65, 0.65, fc=shade, ec=TEXT_COLOR, lw=0.5))
        axis.text(left + 2.2, 2.1, f"segment {i + 1}", ha="center", color=TEXT_COLOR)
        if i < 3:
            _arrow(axis, (left + 4.5, 2.92), (left + 4.95, 2.92))
    _arrow(axis, (9.9, 3.4), (6.4, 3.4), connectionstyle="arc3,rad=0.35", mutation_scale=12, color=SWEPT, lw=1.4)
    axis.text(8.2, 4.55, "sweeps: x ← g(x) for its tokens", ha="center", color=readable(SWEPT))
    for x, text in (
        (3.2, "final: cached,\nnot evaluated\nagain"),
        (8.2, "swept together\nto the tolerance,\nor J times"),
        (15.7, "waiting"),
    ):
        axis.text(x, 1.75, text, ha="center", va="top", color=TEXT_COLOR)
    text = "segments one after another (Gauss-Seidel);\ninside a segment all tokens at once (Jacobi)"
    axis.text(11, -1.2, text, ha="center", color=TEXT_COLOR)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    settings: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 10, "color": TEXT_COLOR, "lw": 1}
    axis.add_patch(FancyArrowPatch(start, end, **settings | style))


def panels_of(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels in two columns."""
    figure = new_figure(height)
    panels = figure.subplots(-(-count // 2), 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in panels[count:]:
        axis.set_visible(False)
    return figure, [*panels[:count]]


@use_style
def error_against_time() -> Figure:
    """Largest error against seconds: a row for each sampler, with the others in grey, and a column for each batch size.

    A line joins the settings of a sampler that no other setting of its own beats in both.
    """
    runs = result("performance")["runs"]
    samplers = ("window", "GS-Jacobi", "Selective Jacobi Decoding", "STARFlow")
    figure = new_figure(6.4)
    panels = figure.subplots(len(samplers), len(runs), sharex="col", sharey=True)
    for column, run in zip(panels.T, runs, strict=True):
        lines = {sampler: _best_settings(run["grid"], sampler) for sampler in ("auto", *samplers)}
        for axis, sampler in zip(column, samplers, strict=True):
            for name in samplers:
                axis.plot(*lines[name], color=OTHERS, linewidth=1, zorder=1, label="the other samplers")
            for name in ("auto", sampler):
                color, marker = sampler_style(name)
                axis.plot(*lines[name], color=color, marker=marker, markersize=5, label=name)
            for name, label, line in (("sequential", "exact loop", "--"), ("growing cache", "original sampler", "-.")):
                seconds = strategy(run, name)["seconds"]["median"]
                axis.axvline(seconds, color=sampler_style(name).color, linestyle=line, linewidth=1.2, label=label)
            axis.set(xscale="log", yscale="log", ylim=(4e-7, 10))
            axis.set_yticks([ROUNDING, 1e-4, 1e-2, 1], ["rounding", "1e-4", "1e-2", "1"])
            plain_ticks(axis.xaxis, (1, 3))
            simplify_axes(axis)
        column[0].set_title(f"batch {run['batch']}")
    for axis, sampler in zip(panels[:, 0], samplers, strict=True):
        axis.set_ylabel(textwrap.fill(sampler, 16), color=readable(sampler_style(sampler).color), weight="bold")
    figure.supxlabel("seconds for the batch")
    figure.supylabel("largest error of an entry")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    shown = {label: handle for handle, label in zip(handles, labels, strict=True) if label not in samplers}
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=2)
    return figure


def _best_settings(rows: Iterable[Json], sampler: str) -> tuple[list[float], list[float]]:
    """Seconds and largest errors of the settings of a sampler that no other one of its own beats in both."""
    points: list[tuple[float, float]] = []
    for row in sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["seconds"]):
        if not points or row["max_error"] < points[-1][1]:
            points.append((row["seconds"], max(row["max_error"], ROUNDING)))
    seconds, errors = zip(*points, strict=True)
    return [*seconds], [*errors]


@use_style
def regimes() -> Figure:
    """Exact loops in encoding passes against the weights of a block, a panel for each batch size.

    Beside them is the least time of sweeps that evaluate every token five times.
    """
    runs = sorted(result("regimes")["runs"], key=lambda run: run["weights_mb"])
    batches = sorted({run["batch_size"] for run in runs})
    figure = new_figure(6.4)
    panels = figure.subplots(len(batches), 1, sharex=True, sharey=True)
    color = sampler_style("gs-jacobi").color
    for axis, batch in zip(panels, batches, strict=True):
        random, trained = ([run for run in runs if run["batch_size"] == batch and run["trained"] == kind]
                           for kind in (False, True))  # fmt: skip
        sizes = [run["weights_mb"] for run in random]
        for way, name, line in ((EXACT_LOOP, "exact loop", "-"), (LOOP_IN_PYTORCH, "exact loop in PyTorch", "--")):
            passes = [in_passes(run, way) for run in random]
            axis.plot(sizes, passes, line, color=sampler_style("sequential").color, marker="o", label=name)
        axis.plot(
            [run["weights_mb"] for run in trained], [in_passes(run) for run in trained], linestyle="", marker="*",
            markersize=12, color=sampler_style("auto").color, label="exact loop of a trained model",
        )  # fmt: skip
        for way, name, line in ((PASS, "5 sweeps, float32", "-"), (BF16_PASS, "5 sweeps, bfloat16", ":")):
            axis.plot(sizes, [5 * in_passes(run, way) for run in random], line, color=color, label=name)
        axis.set(xscale="log", yscale="log", title=f"batch {batch}")
        plain_ticks(axis.xaxis, (1,))
        plain_ticks(axis.yaxis, (1, 3))
        simplify_axes(axis)
    figure.supxlabel("weights of a block, MB")
    figure.supylabel("time of a block's inverse, in encoding passes")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@use_style
def masked_flows() -> Figure:
    """Speed-ups of zuko's flows against features: a panel for a flow and a direction, a line for a number of rows."""
    markers = {1: "o", 100: "^", 10_000: "s", 1_000_000: "D"}
    figure, panels = panels_of(4, 5.4)
    kinds = [(direction, flow) for direction in ("slow", "fast") for flow in ("MAF", "NSF")]
    runs = [run for run in result("masked-flows")["runs"] if run["library"] == "zuko" and run["features"] <= 64]
    for axis, kind in zip(panels, kinds, strict=True):
        direction, flow = kind
        for place, (rows, marker) in enumerate(markers.items()):
            same = [run for run in runs if (run["direction"], run["flow"], run["rows"]) == (*kind, rows)]
            points = [(run["features"], run["speed_up"]) for run in same]
            color, label = ORDERED(0.8 * place / (len(markers) - 1)), f"{rows:,} row{'s' * (rows > 1)}"
            axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{flow}, {'sampling' if direction == 'slow' else 'log_prob'}")
        plain_ticks(axis.yaxis, (1,))
        axis.set_xticks([2, 5, 10, 20, 64], ["2", "5", "10", "20", "64"])
        axis.minorticks_off()
        simplify_axes(axis)
    figure.supxlabel("features")
    figure.supylabel("speed-up over zuko")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


@use_style
def speed() -> Figure:
    """README's chart: speed-ups of sampling from zuko's flows, against the number of features."""
    runs = [run for run in result("masked-flows")["runs"] if (run["library"], run["direction"]) == ("zuko", "slow")]
    figure = new_figure(3.2)
    axis = figure.subplots()
    for flow, name, offset, side, end in (("MAF", "auto", (0, -68), "right", "top"),
                                          ("NSF", "gs-jacobi", (0, 10), "center", "bottom")):  # fmt: skip
        color, marker = sampler_style(name)
        speed_ups = []
        for rows, line in ((100, ":"), (10_000, "-")):
            same = [run for run in runs if (run["flow"], run["rows"], run["hidden"]) == (flow, rows, 50)]
            points = [(run["features"], run["speed_up"]) for run in same]
            axis.plot(*zip(*points, strict=True), line, color=color, marker=marker)
            speed_ups.append(format_speed_up(points[-1][1]))
        text = "{2}, {3} features: {1} for 10,000 samples\n(dotted: {0} for 100 samples)".format(
            *speed_ups, flow, points[-1][0]
        )
        axis.annotate(text, points[-1], offset, textcoords="offset points", color=readable(color), ha=side, va=end)
    axis.axhline(1, color=TEXT_COLOR, linewidth=0.8)
    axis.text(2, 1.1, "zuko alone", color=TEXT_COLOR)
    axis.set(xscale="log", yscale="log", ylim=(0.8, 2000), xlabel="features", ylabel="speed-up over zuko")
    axis.set_xticks([2, 5, 10, 20, 64], ["2", "5", "10", "20", "64"])
    axis.minorticks_off()
    plain_ticks(axis.yaxis, (1, 3))
    simplify_axes(axis)
    return figure


@use_style
def training() -> Figure:
    """Whole fits by a library and accelerated: training and samples, as shares of the library's time."""
    fits = [run for run in result("fits")["runs"] if run["program"] in ("sbi NPE", "pocomc")]
    colors = {"training": sampler_style("auto").color, "sampling": sampler_style("jacobi").color}
    figure = new_figure(0.85 * len(fits))
    axis = figure.subplots()
    for place, run in enumerate(fits):
        above = 3 * place - 0.75
        library, total = run["program"].split()[0], run["total"]["library"]
        axis.text(0, above, f"{library}, {run['flow']}", va="center", weight="bold", color=TEXT_COLOR)
        for row, way in enumerate(("library", "accelerated")):
            y, left = 3 * place + 0.85 * row, 0.0
            for phase, color in colors.items():
                seconds = sum(run["seconds"][way][phase].values())
                axis.barh(y, seconds / total, 0.75, left, color=color)
                if phase == "training":
                    text = f"training {seconds_text(seconds)}" if seconds > 0.3 * total else seconds_text(seconds)
                    axis.text(left + seconds / total / 2, y, text, ha="center", va="center", color="white")
                elif way == "library":
                    text = f"samples {seconds_text(seconds)}"
                    axis.text(1, above, text, ha="right", va="center", color=readable(color))
                left += seconds / total
            text = seconds_text(run["total"][way]) + (f", {format_speed_up(run['speed_up'])} faster" if row else "")
            axis.text(left + 0.01, y, text, va="center", color=TEXT_COLOR)
            axis.text(-0.01, y, "accelerated" if row else library, ha="right", va="center", color=TEXT_COLOR)
    axis.set(xlim=(-0.2, 1.13), ylim=(3 * len(fits) - 1.6, -1.2))
    axis.axis("off")
    return figure


@use_style
def alanine() -> Figure:
    """Densities over phi and psi of the simulation, of proposals and of weighted proposals, and free energies."""
    runs = {run["what"]: run for run in result("alanine")["runs"]}
    simulation, many = runs["simulations"], runs["100,000 proposals"]
    figure = new_figure(5.9)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = halves
    axes = top.subplots(1, 3, sharey=True)
    panels = {"simulation": simulation, "100,000 proposals": many["unweighted"], "weighted": many["weighted"]}
    for axis, title, of_bins in zip(axes, panels, (simulation["map"], *many["maps"]), strict=True):
        with np.errstate(divide="ignore"):
            values = -np.log(np.array(of_bins).T)
        image = axis.imshow(
            values - values.min(), origin="lower", extent=(-180, 180, -180, 180), cmap="viridis", vmin=0, vmax=10
        )
        axis.set(title=title, xlabel="phi, degrees", xticks=(-120, 0, 120), yticks=(-120, 0, 120))
    axes[0].set_ylabel("psi, degrees")
    top.colorbar(image, ax=axes, label="F / kT; white: no sample", location="bottom", shrink=0.6, extend="max")
    axis = bottom.subplots()
    bins = len(simulation["free_energy"])
    centres = (np.arange(bins) + 0.5) * 360 / bins - 180
    for (label, panel), color, marker in zip(
        panels.items(), ("#000000", "#fba652", "#00519e"), ("", "v", "o"), strict=True
    ):
        values, error = (np.array(panel[name], float) for name in ("free_energy", "error"))  # nan without samples
        axis.errorbar(centres, values, error, color=color, marker=marker, label=label, markersize=4, capsize=2)
    axis.set(xlabel="phi, degrees", ylabel="F / kT", xlim=(-180, 180), ylim=(1, 15), xticks=range(-180, 181, 60))
    axis.legend(loc="upper left")
    simplify_axes(axis)
    return figure


def in_dark(path: Path) -> Image.Image:
    """A chart for a dark page, as docs/site.css shows it: light and dark are exchanged, and hues are kept."""
    with Image.open(path) as chart:
        levels = 255 - np.asarray(chart.convert("RGB"), float)
    turned = 2 * (levels @ LUMINANCE)[..., None] - levels
    background = np.array([0x0D, 0x11, 0x17])  # of GitHub
    return Image.fromarray((255 - (255 - turned.clip(0, 255)) * (255 - background) / 255).astype(np.uint8))


def seconds_text(seconds: float) -> str:
    return f"{seconds:.{0 if seconds >= 9.95 else 1 if seconds >= 0.95 else 2}f} s"


def front() -> None:
    """The tough block of an image token by token, by a window, and with all tokens at once, as an animation."""
    flow = jf.load(MODEL).requires_grad_(False)
    config, settings = flow.config, flow.recommended
    latents = draw_latents(SAMPLE + 1, config.num_tokens, config.token_channels, seed=0)[-1:]
    trajectories = record(flow.guided(settings.guidance), latents, LABEL, settings.denoise)
    title = f"{MODEL}: one image of {config.num_tokens} tokens through block {config.num_blocks - 1}"
    save_animation(title, trajectories, FIGURES / "front.gif")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help="such as training; by default all, and front.gif")
    names = options.parse_args().names
    for draw in (overview, partitions, error_against_time, regimes, masked_flows, speed, training, alanine):
        name = draw.__name__.replace("_", "-")
        if not names or name in names:
            save_png(draw(), FIGURES / f"{name}.png")
    if not names or "speed" in names:
        save_png(in_dark(FIGURES / "speed.png"), FIGURES / "speed-dark.png")
    if not names:
        front()


if __name__ == "__main__":
    main()
