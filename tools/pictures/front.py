"""Solves of one block, recorded call by call, and their animation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.context import NO_CONTEXT
from jacobiflow.data import quantize
from jacobiflow.models.flow import Flow
from jacobiflow.plots import sampler_style
from jacobiflow.plots.style import use_style
from tools.pictures.palette import FINAL_TOKEN, WAITING_TOKEN, readable

TOLERANCE = 1e-3
ROWS = 64  # states whose images are made together
FRAME, LAST_FRAME = 70, 3000  # milliseconds
CAPTION = "grey: final; in colour: evaluated by the next call; light: waiting"


class Recorder:
    """A block that records the tokens that every call reads, and the run of tokens that it evaluates."""

    is_pure = True  # as good as: nobody trains with the states

    def __init__(self, block: jf.Block) -> None:
        self.block = block
        self.states: list[Tensor] = []
        self.runs: list[tuple[int, int]] = []

    def init_cache(self, z: Tensor, context: jf.Context = NO_CONTEXT) -> Any:
        return self.block.init_cache(z, context)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        self.states.append(x.clone())
        self.runs.append((start, stop))
        return self.block.update(x, z, start, stop, cache)


def token_colors(runs: Sequence[tuple[int, int]], num_tokens: int, color: str) -> np.ndarray[Any, Any]:
    """The tokens before each of K calls, (K, T, 3): final, evaluated by the call in `color`, or waiting."""
    rows = np.tile(to_rgb(WAITING_TOKEN), (len(runs), num_tokens, 1))
    for row, (start, stop) in zip(rows, runs, strict=True):
        row[:start], row[start:stop] = to_rgb(FINAL_TOKEN), to_rgb(color)
    return rows


class Trajectory(NamedTuple):
    """One solve of one block, before each of its K calls and at the end.

    Attributes:
        pixels: Images if the block had ended at each state, (K + 1, h, w, 3).
        tokens: Colours of the tokens in raster order, (K + 1, side, side, 3).
        residual: The largest |g(x) - x| of the last state; 0 for the exact loop.
    """

    pixels: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    residual: float


def record(flow: Flow, latents: Tensor, label: int, denoise: float) -> dict[str, Trajectory]:
    """Solves the first block of sampling token by token, by a window of a sixth of the tokens, and by Jacobi sweeps.

    Sweeps go to half the tolerance and are certified to it; the pass that certifies is the last call.
    """
    size = flow.config.num_tokens // 6
    solvers = {
        "sequential": jf.Solver(jf.Sequential()),
        f"window:{size}": jf.Solver(jf.Window(size), tolerance_factor=0.5),
        "jacobi": jf.Solver(jf.Whole(), tolerance_factor=0.5),
    }
    return {
        name: _trajectory(flow, latents, label, denoise, solver, sampler_style(name).color)
        for name, solver in solvers.items()
    }


def _trajectory(
    flow: Flow, latents: Tensor, label: int, denoise: float, solver: jf.Solver, color: str
) -> Trajectory:  # fmt: skip
    last, residual = flow.config.num_blocks - 1, 0.0
    recorder = Recorder(flow.inverse_block(last))

    def solve(i: int, z: Tensor) -> Tensor:
        """The solution of a block; of the first one all recorded states, with which the other blocks continue."""
        nonlocal residual
        labels = torch.full((len(z),), label)
        if i != last:
            return jf.solve(flow.inverse_block(i), z, jf.Solver(jf.Sequential()), labels, batch_size=ROWS).x
        solution = jf.solve(recorder, z, solver, labels, tolerance=TOLERANCE)
        residual = float(solution.residual)
        return torch.cat((*recorder.states, solution.x))

    with torch.no_grad():
        images = flow.from_tokens(flow.map_blocks_reversed(flow.prior_tokens(latents), solve))
    if denoise:
        images = jf.denoise(flow, images, label, denoise, ROWS)
    pixels = quantize(images).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()

    length = flow.config.num_tokens
    side, order = math.isqrt(length), flow.blocks[last].permutation(torch.arange(length).view(1, -1, 1)).flatten()
    tokens = np.empty((len(images), length, 3))
    tokens[:, order] = token_colors([*recorder.runs, (length, length)], length, color)
    return Trajectory(pixels, tokens.reshape(-1, side, side, 3), residual)


@use_style
def save_animation(title: str, trajectories: Mapping[str, Trajectory], path: Path) -> None:
    """Writes a GIF with a frame for each call of the longest trajectory: images above, tokens below."""
    figure = Figure(figsize=(5.6, 4.7), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(trajectories))
    figure.suptitle(title)
    figure.supxlabel(CAPTION)
    calls = max(len(trajectory.pixels) for trajectory in trajectories.values()) - 1
    for axis in axes.flat:
        axis.axis("off")
    artists = [
        (above.imshow(trajectory.pixels[0]), below.imshow(trajectory.tokens[0]))
        for trajectory, (above, below) in zip(trajectories.values(), axes.T, strict=True)
    ]

    def draw(frame: int) -> Image.Image:
        for (name, trajectory), axis, pictures in zip(trajectories.items(), axes[0], artists, strict=True):
            total = len(trajectory.pixels) - 1
            call = min(frame, total)
            end = "exact" if trajectory.residual == 0 else f"certified {trajectory.residual:.0e}"
            text = f"call {call} of {total}\n" if call < total else f"{total} calls,\n{end}"
            axis.set_title(f"{name}\n{text}", color=readable(sampler_style(name).color))
            for picture, states in zip(pictures, trajectory[:2], strict=True):
                picture.set_data(states[call])
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    canvas = FigureCanvasAgg(figure)
    draw(0)
    figure.set_layout_engine("none")  # All frames have the layout of the first.
    frames = [draw(call) for call in range(calls + 1)]
    # With one palette and without dithering, flat colours stay flat, and most of a frame is that of the frame before.
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: calls // 4]])).quantize(256)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=[FRAME] * calls + [LAST_FRAME], loop=0)
