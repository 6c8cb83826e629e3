"""Solves of one block, recorded state by state, and their animation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.context import NO_CONTEXT
from jacobiflow.data import quantize
from jacobiflow.fixed_point import solve_certified
from jacobiflow.models.flow import Flow
from jacobiflow.plots import sampler_style
from jacobiflow.plots.style import use_style
from tools.pictures.palette import FINAL_TOKEN, WAITING_TOKEN

ROWS = 64  # states whose images are made together
FRAMES_A_SECOND, PAUSE = 14, 3  # the seconds of the last frame


class Recorder:
    """A block that records the tokens that every call reads, and the run of tokens that it evaluates."""

    is_causal = True

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


@dataclass(frozen=True)
class Trajectory:
    """One solve of one block, before each of its K calls and at the end.

    Attributes:
        runs: K runs of tokens, from start to stop, in the block's causal order.
        states: (K + 1, T, C), the tokens in this order.
        images: (K + 1, c, h, w), samples if the block had ended at each state.
        positions: (T,), the place of each token in raster order.
        tolerance: The tolerance of the solve.
        residual: The largest |g(x) - x| of the last state; 0 for the exact loop.
    """

    runs: tuple[tuple[int, int], ...]
    states: Float[Tensor, "k t c"]
    images: Float[Tensor, "k n h w"]
    positions: Int[Tensor, " t"]
    tolerance: float
    residual: float

    @cached_property
    def is_final(self) -> Bool[Tensor, "k t"]:
        """True for tokens that stay within the tolerance of their last value."""
        away = (self.states - self.states[-1]).abs().amax(dim=2) > self.tolerance
        return ~away.flip(0).cummax(dim=0).values.flip(0)


def record(
    flow: Flow, latents: Float[Tensor, "1 t d"], label: int, denoise: float, tolerance: float = 1e-3
) -> dict[str, Trajectory]:
    """Solves the first block of sampling token by token, by a window of a sixth of the tokens, and by Jacobi sweeps.

    Sweeps go to half the tolerance and are certified to it; the pass that certifies is the last call.
    """
    stopping, size = jf.Tolerance(tolerance / 2), max(flow.config.num_tokens // 6, 2)
    solvers = {
        "sequential": jf.Solver(jf.Sequential()),
        f"window:{size}": jf.Solver(jf.Window(size), stopping=stopping),
        "jacobi": jf.Solver(jf.Whole(), stopping=stopping),
    }
    return {name: _trajectory(flow, latents, label, denoise, solver, tolerance) for name, solver in solvers.items()}


def _trajectory(
    flow: Flow, latents: Tensor, label: int, denoise: float, solver: jf.Solver, tolerance: float
) -> Trajectory:
    last = flow.config.num_blocks - 1
    recorder, residuals = Recorder(flow.inverse_blocks[last]), []

    def solve(i: int, z: Tensor) -> Tensor:
        """The solution of a block; of the first one all recorded states, with which the other blocks continue."""
        labels = torch.full((len(z),), label)
        if i != last:
            return jf.solve(flow.inverse_blocks[i], z, jf.Solver(jf.Sequential()), labels, batch_size=ROWS).x
        solution = solve_certified(recorder, z, solver, labels, tolerance=tolerance)
        residuals.append(float(solution.residual))
        recorder.states.append(solution.x)
        return torch.cat(recorder.states)

    with torch.no_grad():
        images = flow.from_tokens(flow.map_blocks_reversed(flow.prior_tokens(latents), solve))
    if denoise:
        images = jf.denoise(flow, images, label, denoise, ROWS)
    tokens = torch.arange(flow.config.num_tokens).view(1, -1, 1)
    positions = flow.blocks[last].permutation(tokens).flatten()
    return Trajectory(tuple(recorder.runs), torch.cat(recorder.states), images, positions, tolerance, *residuals)


def token_colors(trajectory: Trajectory, call: int, color: str) -> np.ndarray[Any, Any]:
    """A square raster (side, side, 3) of the tokens before a call: final, in the sampler's colour, or waiting."""
    side = math.ceil(math.sqrt(len(trajectory.positions)))
    start, stop = trajectory.runs[call] if call < len(trajectory.runs) else (0, 0)
    tokens = np.tile(to_rgb(WAITING_TOKEN), (len(trajectory.positions), 1))
    tokens[start:stop] = to_rgb(color)
    tokens[trajectory.is_final[call].numpy()] = to_rgb(FINAL_TOKEN)
    raster = np.ones((side * side, 3))
    raster[trajectory.positions.numpy()] = tokens
    return raster.reshape(side, side, 3)


def _pixels(trajectory: Trajectory, call: int) -> np.ndarray[Any, Any]:
    return quantize(trajectory.images[call]).permute(1, 2, 0).expand(-1, -1, 3).numpy()


@use_style
def readable(color: str) -> str:
    """Returns the colour, darkened for text on white to a contrast of at least 4.5."""
    red, green, blue = to_rgb(color)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = min(1.0, (0.17 / max(light, 1e-9)) ** (1 / 2.2))
    return str(to_hex((factor * red, factor * green, factor * blue)))


def save_animation(title: str, trajectories: Mapping[str, Trajectory], path: Path) -> None:
    """Writes a GIF with a frame for each call of the longest trajectory: images above, tokens below."""
    figure = Figure(figsize=(5.6, 4.7), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(trajectories))
    figure.suptitle(title)
    figure.supxlabel("grey: final; in colour: evaluated by the next call; light: waiting")
    calls = max(len(trajectory.runs) for trajectory in trajectories.values())
    artists = [(above.imshow(_pixels(t, 0)), below.imshow(token_colors(t, 0, "white")))
               for t, (above, below) in zip(trajectories.values(), axes.T, strict=True)]  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")

    def draw(frame: int) -> Image.Image:
        for (name, trajectory), axis, (image, tokens) in zip(trajectories.items(), axes[0], artists, strict=True):
            total, color = len(trajectory.runs), sampler_style(name).color
            call = min(frame, total)
            end = "exact" if trajectory.residual == 0 else f"certified {trajectory.residual:.0e}"
            text = f"call {call} of {total}\n" if call < total else f"{total} calls,\n{end}"
            axis.set_title(f"{name}\n{text}", color=readable(color))
            image.set_data(_pixels(trajectory, call))
            tokens.set_data(token_colors(trajectory, call, color))
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])

    draw(0)
    figure.set_layout_engine("none")  # once for all frames
    frames = [draw(frame) for frame in range(calls + 1)]
    # One palette, without dithering: flat colours stay flat, and most of a frame is that of the frame before.
    some = np.concatenate([np.asarray(frames[i]) for i in (0, calls // 2, calls)])
    palette = Image.fromarray(some).quantize(256)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [1000 // FRAMES_A_SECOND] * calls + [1000 * PAUSE]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
