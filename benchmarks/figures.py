"""Draws the figures of the method: `python benchmarks/figures.py` writes docs/figures/*.png and front.gif.

overview.png and partitions.png are of docs/solvers.md, front.png and front.gif of README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

import jacobiflow as jf
from jacobiflow.experiments.front import record
from jacobiflow.latents import draw_latents
from jacobiflow.plots import front_frames, front_still, sampler_style, save_gif, save_png
from jacobiflow.plots.style import EASY, FINAL, INK, TOUGH, WAITING, new_figure, readable, styled

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures"
SWEPT = sampler_style("gs-jacobi").color
MODEL = "emoji-p2"
SAMPLE, LABEL = 10, 1  # a person of seed 0, whose number of sweeps is about the median of the first 20


class Recorder:
    """A block that notes which tokens each call evaluates."""

    def __init__(self, block: jf.Block) -> None:
        self.block = block
        self.runs: list[tuple[int, int]] = []

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> Any:
        """The block's own cache."""
        return self.block.init_cache(z, context)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        """The block's own map."""
        self.runs.append((start, stop))
        return self.block.update(x, z, start, stop, cache)


@styled
def partitions() -> Figure:
    """Which tokens each partition sweeps when, measured on the tough block of `digits-p1`."""
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
    figure = new_figure(3.2)
    axes = figure.subplots(1, 4, sharey=True)
    for axis, color, (name, solver) in zip(axes, colors, solvers.items(), strict=True):
        recorder = Recorder(block)
        solution = jf.solve(recorder, z, solver, label)
        raster = np.ones((flow.config.num_tokens, flow.config.num_tokens, 3))
        for row, (start, stop) in enumerate(recorder.runs):
            raster[row] = to_rgb(WAITING)
            raster[row, :start], raster[row, start:stop] = to_rgb(FINAL), to_rgb(color)
        axis.imshow(raster, interpolation="none")
        axis.set_title(name, color=readable(color))
        axis.set_xlabel(f"token\n{solution.sweeps} sweeps,\n{solution.token_evaluations} evaluations")
    axes[0].set_ylabel("sweep")
    final, *swept, waiting = (Rectangle((0, 0), 1, 1, color=shade) for shade in (FINAL, *colors, WAITING))
    handles: list[Any] = [final, tuple(swept), waiting]
    figure.legend(
        handles, ["final", "swept", "waiting"], loc="outside lower center", ncols=3,
        handlelength=4, handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
    )  # fmt: skip
    return figure


@styled
def overview() -> Figure:
    """How a sample comes about: noise through the blocks, the tough one cut into segments (cf. Figures 1 and 6)."""
    figure = new_figure(3.6)
    figure.set_layout_engine("none")
    axis = figure.add_axes((0.01, 0, 0.98, 1))
    axis.set(xlim=(0, 22), ylim=(0, 8.2))
    axis.axis("off")
    _chain(axis)
    _segments(axis)
    return figure


def _chain(axis: Axes) -> None:
    axis.text(-0.1, 6.75, "noise z", va="center", color=INK)
    left = 2.0
    for number in reversed(range(8)):
        color, ink = (TOUGH, "white") if number == 7 else (EASY, INK)
        axis.add_patch(FancyBboxPatch((left, 6.2), 1.5, 1.1, boxstyle="round,pad=0.05", fc=color, ec="none"))
        axis.text(left + 0.75, 6.75, f"block\n{number}", ha="center", va="center", color=ink)
        _arrow(axis, (left - 0.55, 6.75), (left - 0.05, 6.75))
        left += 2.2
    _arrow(axis, (left - 0.55, 6.75), (left - 0.05, 6.75))
    axis.text(left + 0.1, 6.75, "image x", va="center", color=INK)
    axis.text(12.3, 7.75, "easy blocks: all tokens at once, x ← g(x), until |g(x) − x| ≤ tolerance", ha="center",
              color=INK)  # fmt: skip
    axis.text(2.75, 7.75, "tough block", ha="center", color=INK)


def _segments(axis: Axes) -> None:
    axis.plot([2.0, 1.0], [6.1, 5.2], color=TOUGH, lw=0.8)
    axis.plot([3.5, 21.0], [6.1, 5.2], color=TOUGH, lw=0.8)
    names = ("segment 1", "segment 2", "segment 3", "segment 4")
    for i, name in enumerate(names):
        left = 1.0 + 5.0 * i
        for token in range(6):
            shade = FINAL if i == 0 else (SWEPT if i == 1 else WAITING)
            axis.add_patch(Rectangle((left + 0.75 * token, 2.6), 0.65, 0.65, fc=shade, ec=INK, lw=0.5))
        axis.text(left + 2.2, 2.1, name, ha="center", color=INK)
        if i < 3:
            _arrow(axis, (left + 4.5, 2.92), (left + 4.95, 2.92))
        if i == 1:
            loop = FancyArrowPatch((left + 3.9, 3.4), (left + 0.4, 3.4), connectionstyle="arc3,rad=0.35",
                                   arrowstyle="-|>", mutation_scale=12, color=SWEPT, lw=1.4)  # fmt: skip
            axis.add_patch(loop)
            axis.text(left + 2.2, 4.55, "sweeps: x ← g(x) for its tokens", ha="center", color=readable(SWEPT))
    axis.text(3.2, 1.3, "final: in the cache,\nnever evaluated again", ha="center", color=INK, va="center")
    axis.text(8.2, 1.3, "swept together until\nwithin the tolerance,\nor J times", ha="center", color=INK,
              va="center")  # fmt: skip
    axis.text(15.7, 1.3, "waiting", ha="center", color=INK, va="center")
    axis.text(11, 0.35, "segments one after another (Gauss-Seidel); inside a segment all tokens at once (Jacobi)",
              ha="center", color=INK)  # fmt: skip


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, lw=1))


def main() -> None:
    """Draw all of them."""
    save_png(overview(), OUT / "overview.png")
    save_png(partitions(), OUT / "partitions.png")
    flow = jf.load(MODEL)
    config = flow.requires_grad_(False).config
    latents = draw_latents(SAMPLE + 1, config.num_tokens, config.token_channels, seed=0)[-1:]
    asked = flow.recommended
    trajectories = record(flow, config.num_blocks - 1, latents, torch.tensor([LABEL]), asked.guidance, asked.denoise)
    block = config.num_blocks - 1
    title = f"{MODEL}: one image from the same noise, {config.num_tokens} tokens, through block {block}"
    save_png(front_still(title, trajectories), OUT / "front.png")
    save_gif(front_frames(title, trajectories), OUT / "front.gif")
    for name, found in trajectories.items():
        print(f"{name}: {found.calls} calls, {found.token_evaluations:,} evaluations, {found.certificate:.1e}")


if __name__ == "__main__":
    main()
