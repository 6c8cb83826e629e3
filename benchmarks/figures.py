"""Draws the figures of docs/solvers.md: `python benchmarks/figures.py` writes docs/figures/*.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures"
WAITING, SWEPT, FINAL = "#f2f2f2", "#e69f00", "#0072b2"
EASY, TOUGH, INK = "#56b4e9", "#d55e00", "#222222"


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


def partitions() -> None:
    """Which tokens each partition sweeps when, measured on the tough block of `digits-p1`."""
    flow = jf.load("digits-p1")
    block = flow.blocks[-1]
    z = block.permutation(draw_latents(1, flow.config.num_tokens, flow.config.token_channels, seed=0))
    label = torch.tensor([3])
    tolerance = jf.Tolerance(1e-3)
    solvers = {
        "Sequential()": jf.Solver(jf.Sequential()),
        "Whole(): Jacobi": jf.Solver(jf.Whole(), stopping=tolerance),
        "Segments(4): Gauss-Seidel-Jacobi": jf.Solver(jf.Segments(4), stopping=tolerance),
        "Window(12)": jf.Solver(jf.Window(12), stopping=tolerance),
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.9), sharey=True, layout="constrained")
    for axis, (name, solver) in zip(axes, solvers.items(), strict=True):
        recorder = Recorder(block)
        solution = jf.solve(recorder, z, solver, label)
        raster = np.zeros((flow.config.num_tokens, flow.config.num_tokens))
        for row, (start, stop) in enumerate(recorder.runs):
            raster[row, :start], raster[row, start:stop] = 2, 1
        raster[solution.sweeps :] = np.nan
        axis.imshow(raster, cmap=ListedColormap([WAITING, SWEPT, FINAL]), vmin=0, vmax=2, interpolation="none")
        axis.set_title(f"{name}\n{solution.sweeps} sweeps, {solution.token_evaluations} token evaluations", fontsize=9)
        axis.set_xlabel("token")
    axes[0].set_ylabel("sweep")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (FINAL, SWEPT, WAITING)]
    figure.legend(handles, ["final", "swept", "waiting"], loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(OUT / "partitions.png", dpi=130)
    plt.close(figure)


def overview() -> None:
    """How a sample comes about: noise through the blocks, the tough one cut into segments (cf. Figures 1 and 6)."""
    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    axis.set(xlim=(0, 22), ylim=(0, 8.2))
    axis.axis("off")
    _chain(axis)
    _segments(axis)
    figure.savefig(OUT / "overview.png", dpi=130)
    plt.close(figure)


def _chain(axis: Axes) -> None:
    axis.text(0.2, 6.75, "noise z", va="center", color=INK)
    left = 2.0
    for number, tough in (
        (7, True),
        (6, False),
        (5, False),
        (4, False),
        (3, False),
        (2, False),
        (1, False),
        (0, False),
    ):
        color = TOUGH if tough else EASY
        axis.add_patch(FancyBboxPatch((left, 6.2), 1.5, 1.1, boxstyle="round,pad=0.05", fc=color, ec="none"))
        axis.text(left + 0.75, 6.75, f"block {number}", ha="center", va="center", color="white", fontsize=8.5)
        _arrow(axis, (left - 0.55, 6.75), (left - 0.05, 6.75))
        left += 2.2
    _arrow(axis, (left - 0.55, 6.75), (left - 0.05, 6.75))
    axis.text(left + 0.1, 6.75, "image x", va="center", color=INK)
    axis.text(12.3, 7.75, "easy blocks: all tokens at once, x ← g(x), until |g(x) − x| ≤ tolerance", ha="center",
              color=INK, fontsize=9)  # fmt: skip
    axis.text(2.75, 7.75, "tough block", ha="center", color=INK, fontsize=9)


def _segments(axis: Axes) -> None:
    axis.plot([2.0, 1.0], [6.1, 5.2], color=TOUGH, lw=0.8)
    axis.plot([3.5, 21.0], [6.1, 5.2], color=TOUGH, lw=0.8)
    names = ("segment 1", "segment 2", "segment 3", "segment 4")
    for i, name in enumerate(names):
        left = 1.0 + 5.0 * i
        for token in range(6):
            shade = FINAL if i == 0 else (SWEPT if i == 1 else WAITING)
            axis.add_patch(Rectangle((left + 0.75 * token, 2.6), 0.65, 0.65, fc=shade, ec=INK, lw=0.5))
        axis.text(left + 2.2, 2.1, name, ha="center", color=INK, fontsize=9)
        if i < 3:
            _arrow(axis, (left + 4.5, 2.92), (left + 4.95, 2.92))
        if i == 1:
            loop = FancyArrowPatch((left + 3.9, 3.4), (left + 0.4, 3.4), connectionstyle="arc3,rad=0.35",
                                   arrowstyle="-|>", mutation_scale=12, color=TOUGH, lw=1.4)  # fmt: skip
            axis.add_patch(loop)
            axis.text(left + 2.2, 4.55, "sweeps: x ← g(x) for its tokens", ha="center", color=TOUGH, fontsize=9)
    axis.text(3.2, 1.3, "final: in the cache,\nnever evaluated again", ha="center", color=INK, fontsize=9, va="center")
    axis.text(8.2, 1.3, "swept together until\nwithin the tolerance, or J times", ha="center", color=INK, fontsize=9,
              va="center")  # fmt: skip
    axis.text(15.7, 1.3, "waiting", ha="center", color=INK, fontsize=9, va="center")
    axis.text(11, 0.35, "a segment's solution is passed on to the next one, in order (Gauss-Seidel); inside it all "
              "tokens move at once (Jacobi)", ha="center", color=INK, fontsize=9)  # fmt: skip


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, lw=1))


if __name__ == "__main__":
    matplotlib.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    overview()
    partitions()
    print(f"wrote {OUT}/overview.png and {OUT}/partitions.png")
