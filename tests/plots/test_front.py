"""The animation and the still of a front: a frame a call, and tokens in the colours of their states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from jacobiflow.experiments.front import Trajectory
from jacobiflow.plots import check_picture, front_frames, front_still, sampler_style, save_gif


def make_trajectory(runs: list[tuple[int, int]], certificate: float) -> Trajectory:
    """16 tokens in reverse order, of which each call settles those before its run, at last all."""
    states = torch.ones(len(runs) + 1, 16, 1)
    for call, (start, _) in enumerate(runs):
        states[call, start:] = 0
    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).repeat(len(runs) + 1, 1, 1, 1)
    positions = torch.arange(16).flip(0)
    return Trajectory(1, None, tuple(range(len(runs) + 1)), states, tuple(runs), images, positions, 1e-3, certificate)


@pytest.fixture(scope="module")
def trajectories() -> dict[str, Trajectory]:
    return {
        "sequential": make_trajectory([(t, t + 1) for t in range(16)], 0.0),
        "window:4": make_trajectory([(t, min(t + 4, 16)) for t in range(0, 16, 2)], 5e-4),
        "jacobi": make_trajectory([(0, 16), (6, 16), (12, 16)], 9e-4),
    }


def count(image: Image.Image, name: str) -> int:
    """Pixels in the sampler's colour."""
    color = np.array([round(255 * value) for value in to_rgb(sampler_style(name).color)])
    return int((np.asarray(image) == color).all(axis=2).sum())


def test_a_frame_for_each_call_shows_the_tokens_that_are_settled(trajectories: dict[str, Trajectory]) -> None:
    frames = front_frames("a title", trajectories)
    assert len(frames) == trajectories["sequential"].calls + 1
    assert {frame.width for frame in frames} == {800}
    token = (224 // 4 - 1) ** 2
    for name, settled in (("window:4", [2 * k for k in range(9)]), ("jacobi", [0, 6, 12, 16])):
        pixels = [count(frame, name) for frame in frames]
        shown = [round((pixel - pixels[0]) / token) for pixel in pixels]
        assert shown == settled + [16] * (len(frames) - len(settled))


def test_the_animation_loops_and_is_known_as_ours(trajectories: dict[str, Trajectory], tmp_path: Path) -> None:
    frames = front_frames("a title", trajectories)
    for _ in range(2):  # over its own
        save_gif(frames, tmp_path / "front.gif")
    with Image.open(tmp_path / "front.gif") as read:
        assert (read.format, read.n_frames, read.info["loop"]) == ("GIF", len(frames), 0)
        read.seek(5)
        assert np.abs(np.asarray(read.convert("RGB")).astype(int) - np.asarray(frames[5])).mean() < 3
    frames[0].save(tmp_path / "theirs.gif")
    with pytest.raises(ValueError, match="is not a picture that jacobiflow made"):
        check_picture(tmp_path / "theirs.gif")


def test_bars_of_the_still_are_as_long_as_the_calls(trajectories: dict[str, Trajectory]) -> None:
    pixels = np.asarray(front_still("a title", trajectories))
    assert pixels.shape[1] == 1660
    lengths = {}
    for name, trajectory in trajectories.items():
        color = [round(255 * value) for value in to_rgb(sampler_style(name).color)]
        lengths[name] = (pixels == color).all(axis=2).sum(axis=1).max()
        assert lengths[name] / lengths["sequential"] == pytest.approx(trajectory.calls / 16, abs=0.01)
