"""Draws the figures of the method and of result files: `python -m tools.pictures.figures [NAME ...]`.

examples.png and posterior.png show samples, partitions.png and front.gif the method, and regimes.png, speed.png and
alanine.png result files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import jacobiflow as jf
from benchmarks import FIGURES
from benchmarks.lib.results import parser
from benchmarks.regimes import EXACT_LOOP, LOOP_IN_PYTORCH, PASS, in_passes
from jacobiflow.data import quantize
from jacobiflow.data.grid import TEXT_COLOR
from jacobiflow.models.latents import draw_latents
from jacobiflow.plots import sampler_style, save_png
from jacobiflow.plots.style import RC_PARAMS, new_figure, plain_ticks, simplify_axes, use_style
from tools.docs.render import find_runs, result
from tools.pictures.front import Recorder, record, save_animation, token_colors
from tools.pictures.palette import readable
from tools.pictures.two_moons import posteriors

BLUE, ORANGE, GREY = "#2f81f7", "#e07b2e", "#7c7c7c"  # can be read on white and on black
EXAMPLE_PROMPTS = [
    "sunglasses", "ok hand medium skin", "large blue diamond", "thumbsup", "broken heart",
    "star struck", "smiley cat", "hand light skin", "purple heart",
]  # fmt: skip
use_clear_style = rc_context(
    RC_PARAMS
    | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    | dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none")
)
"""Decorates a function that draws a figure without a background, for white paper and black."""
MODEL = "emoji-p2"
SAMPLE, LABEL = 10, 1  # a person of seed 0, whose number of sweeps is about the median of the first 20


@use_style
def partitions() -> Figure:
    """The tokens that each partition sweeps, sweep by sweep, in the tough block of `digits-p1`."""
    flow = jf.load("digits-p1")
    block = flow.blocks[-1]
    z = block.permutation(draw_latents(1, flow.config.num_tokens, flow.config.token_dim, seed=0))
    label = torch.tensor([3])
    solvers = {
        "sequential": jf.Solver(jf.Sequential()),
        "Jacobi": jf.Solver(jf.Whole()),
        "GS-Jacobi, 4 segments": jf.Solver(jf.Segments(4)),
        "window of 12": jf.Solver(jf.Window(12)),
    }
    figure = new_figure(5.2)
    axes = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axis, (name, solver) in zip(axes, solvers.items(), strict=True):
        recorder, color = Recorder(block), sampler_style(name).color
        solution = jf.solve(recorder, z, solver, label, tolerance=1e-3, certify=False)
        raster = np.ones((flow.config.num_tokens, flow.config.num_tokens, 3))
        raster[: len(recorder.runs)] = token_colors(recorder.runs, flow.config.num_tokens, color)
        axis.imshow(raster, interpolation="none", aspect="auto")
        count = f"{solution.sweeps} sweeps, {solution.token_evaluations} evaluations"
        axis.set_title(f"{name}:\n{count}", color=readable(color))
    axes[0].text(18, 42, "final", ha="center")
    axes[0].text(52, 28, "waiting", ha="center")
    axes[0].annotate("evaluated", (18, 17), (34, 9), va="center", arrowprops={"arrowstyle": "->"})
    figure.supxlabel("token")
    figure.supylabel("sweep")
    return figure


def scale_axes(axis: Axes, x_subs: Sequence[float] = (1, 3), y_subs: Sequence[float] = (1, 3)) -> None:
    """Makes both axes logarithmic, with plain numbers at these multiples of the powers of ten."""
    axis.set(xscale="log", yscale="log")
    plain_ticks(axis.xaxis, x_subs)
    plain_ticks(axis.yaxis, y_subs)
    simplify_axes(axis)


def scale_features(axis: Axes, y_subs: Sequence[float]) -> None:
    """Makes both axes logarithmic, with the numbers of features that were measured."""
    scale_axes(axis, y_subs=y_subs)
    axis.set_xticks([2, 5, 10, 20, 64], ["2", "5", "10", "20", "64"])
    axis.minorticks_off()


def share_legend(figure: Figure) -> None:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


@use_style
def regimes() -> Figure:
    """The exact loop by native code and by PyTorch beside five sweeps, against the weights of a block."""
    runs = [run for run in result("regimes")["runs"] if not run["trained"]]
    runs.sort(key=lambda run: run["weights_mb"])
    batches = (min(run["batch_size"] for run in runs), max(run["batch_size"] for run in runs))
    figure = new_figure(5.2)
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    loop, sweeps = (sampler_style(name).color for name in ("auto", "gs-jacobi"))
    for axis, batch in zip(panels, batches, strict=True):
        rows = [run for run in runs if run["batch_size"] == batch]
        sizes = [run["weights_mb"] for run in rows]
        for passes, name, color in (
            ([in_passes(run, LOOP_IN_PYTORCH) for run in rows], "token by token, PyTorch", TEXT_COLOR),
            ([5 * in_passes(run, PASS) for run in rows], "five sweeps of all tokens", sweeps),
            ([in_passes(run, EXACT_LOOP) for run in rows], "token by token, native code", loop),
        ):
            axis.plot(sizes, passes, color=color, marker="o", markersize=4, label=name)
        axis.set_title(f"{batch} sample{'s' * (batch > 1)} at a time", loc="left")
        scale_axes(axis, x_subs=(1, 3))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.supxlabel("weights of a block, MB")
    figure.supylabel("time to sample / time to encode")
    return figure


@use_style
def speed() -> Figure:
    """README's chart: speed-ups of sampling from zuko's flows, against the number of features."""
    figure = new_figure(3.6)
    axis = figure.subplots()
    for flow, name in (("MAF", "auto"), ("NSF", "gs-jacobi")):
        color, marker = sampler_style(name)
        for rows, line in ((10_000, "-"), (100, ":")):
            runs = find_runs("masked-flows", library="zuko", direction="slow", flow=flow, rows=rows, hidden=50)
            points = [(run["features"], run["speed_up"]) for run in runs]
            label = f"{flow}, {rows:,} samples"
            axis.plot(*zip(*points, strict=True), line, color=color, marker=marker, label=label)
    axis.axhline(1, color=TEXT_COLOR, linewidth=0.8)
    axis.text(2, 1.1, "zuko alone", color=TEXT_COLOR)
    axis.set(ylim=(0.8, 2000), xlabel="features", ylabel="speed-up over zuko")
    scale_features(axis, y_subs=(1, 3))
    share_legend(figure)
    return figure


def scatter(axis: Axes, points: torch.Tensor) -> None:
    axis.scatter(points[:, 0], points[:, 1], s=2, linewidths=0, color=BLUE, alpha=0.6)
    axis.set(xlim=(-0.5, 0.5), ylim=(-0.5, 0.5), aspect="equal", xticks=(-0.4, 0, 0.4), yticks=(-0.4, 0, 0.4))
    simplify_axes(axis)
    axis.grid(visible=False)


@use_clear_style
def posterior() -> Figure:
    """Samples of the posterior of two moons: exact, by sbi, and by sbi accelerated, from the same random numbers."""
    samples = posteriors()
    difference = float((samples.accelerated - samples.library).abs().max())
    figure = new_figure(2.5)
    titles = ("exact posterior", "sbi", f"sbi, accelerated:\nat most {difference:.0e} away")
    for axis, title, points in zip(figure.subplots(1, 3, sharex=True, sharey=True), titles, samples, strict=True):
        scatter(axis, points)
        axis.set_title(title)
    figure.supxlabel("first parameter")
    figure.supylabel("second parameter")
    return figure


@use_clear_style
def examples() -> Figure:
    """Samples of three flows: parameters of two moons, emoji of nine prompts, and a molecule."""
    figure = new_figure(2.4)
    left, middle, right = figure.subplots(1, 3)
    scatter(left, posteriors().accelerated)
    left.set(title="parameters\nof a simulation", xlabel="first parameter", ylabel="second parameter")
    draw_cards(middle, jf.sample(jf.load("emoji-star"), len(EXAMPLE_PROMPTS), context=EXAMPLE_PROMPTS, seed=1).images)
    middle.set(title="pictures\nby their names")
    draw_free_energy(right, find_runs("alanine", what="100,000 proposals")[0]["maps"][0])
    right.set(title="angles of\na molecule", xlabel="phi, degrees", ylabel="psi, degrees")
    return figure


def draw_cards(axis: Axes, images: torch.Tensor) -> None:
    """Draws images in rows of three, each on a white card with round corners."""
    axis.axis("off")
    for i, image in enumerate(quantize(images).permute(0, 2, 3, 1).numpy()):
        row, column = divmod(i, 3)
        corner = column + 0.07, row + 0.07
        axis.add_patch(FancyBboxPatch(corner, 0.86, 0.86, "round,pad=0,rounding_size=0.12", fc="white", ec="none"))
        extent = (column + 0.12, column + 0.88, row + 0.88, row + 0.12)
        axis.imshow(image, extent=extent, interpolation="none", zorder=2)  # above the card
    axis.set(xlim=(0, 3), ylim=(3, 0), aspect="equal")


def draw_free_energy(axis: Axes, of_bins: Sequence[Sequence[float]]) -> Any:
    """Draws -log of the shares of bins over phi and psi, above their smallest; bins without samples stay blank."""
    with np.errstate(divide="ignore"):
        values = -np.log(np.array(of_bins).T)
    extent = (-180, 180, -180, 180)
    axis.set(xticks=(-120, 0, 120), yticks=(-120, 0, 120))
    return axis.imshow(values - values.min(), origin="lower", extent=extent, cmap="viridis", vmin=0, vmax=10)


@use_clear_style
def alanine() -> Figure:
    """Free energies over phi and psi of the simulation, of proposals and of weighted proposals, and along phi."""
    runs = {run["what"]: run for run in result("alanine")["runs"]}
    simulation, many = runs["simulations"], runs["100,000 proposals"]
    figure = new_figure(5.9)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = halves
    axes = top.subplots(1, 3, sharey=True)
    panels = {"simulation": simulation, "flow": many["unweighted"], "flow, weighted": many["weighted"]}
    for axis, title, of_bins in zip(axes, panels, (simulation["map"], *many["maps"]), strict=True):
        image = draw_free_energy(axis, of_bins)
        axis.set(title=title, xlabel="phi, degrees")
    axes[0].set_ylabel("psi, degrees")
    top.colorbar(
        image, ax=axes, label="free energy F / kT; blank: no sample", location="bottom", shrink=0.6, extend="max"
    )
    axis = bottom.subplots()
    bins = len(simulation["free_energy"])
    centres = (np.arange(bins) + 0.5) * 360 / bins - 180
    axis.plot(centres, simulation["free_energy"], color=GREY, linewidth=5, alpha=0.5, label="simulation")
    for name, color, marker in (("flow", ORANGE, "v"), ("flow, weighted", BLUE, "o")):
        values, error = (np.array(panels[name][key], float) for key in ("free_energy", "error"))  # nan without samples
        axis.errorbar(centres, values, error, color=color, marker=marker, label=name, markersize=4, capsize=2)
    axis.set(
        xlabel="phi, degrees", ylabel="free energy F / kT", xlim=(-180, 180), ylim=(1, 12), xticks=range(-180, 181, 60)
    )
    axis.legend(loc="upper left")
    simplify_axes(axis)
    return figure


def front() -> None:
    """The tough block of an image token by token, by a window, and with all tokens at once, as an animation."""
    flow = jf.load(MODEL).requires_grad_(False)
    config, settings = flow.config, flow.recommended
    latents = draw_latents(SAMPLE + 1, config.num_tokens, config.token_dim, seed=0)[-1:]
    trajectories = record(flow.guided(settings.guidance), latents, LABEL, settings.denoise)
    title = f"{MODEL}: one image of {config.num_tokens} tokens through block {config.num_blocks - 1}"
    save_animation(title, trajectories, FIGURES / "front.gif")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help="such as speed or front; by default all")
    names = options.parse_args().names
    for draw in (examples, posterior, partitions, regimes, speed, alanine):
        name = draw.__name__.replace("_", "-")
        if not names or name in names:
            save_png(draw(), FIGURES / f"{name}.png")
    if not names or "front" in names:
        front()


if __name__ == "__main__":
    main()
