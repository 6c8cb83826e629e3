"""Trajectories of a block's solve, and their animation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

import jacobiflow as jf
from tests.helpers.problems import latents, make_flow
from tools.pictures.front import record, save_animation, token_colors
from tools.pictures.palette import FINAL_TOKEN


def test_trajectories_end_at_the_exact_image(tmp_path: Path) -> None:
    flow = make_flow(num_classes=3, noise_std=0.1, num_blocks=2).guided(jf.Guidance(0.4))
    z = latents(flow, 1)
    trajectories = record(flow, z, 2, denoise=1.0, tolerance=1e-4)
    exact = jf.sample(
        flow, latents=z, labels=[2], strategy="sequential", settings=jf.SamplingSettings(denoise=1.0)
    ).images[0]
    for trajectory in trajectories.values():
        assert len(trajectory.states) == len(trajectory.images) == len(trajectory.runs) + 1
        assert (trajectory.images[-1] - exact).abs().max() < 0.05
        assert trajectory.residual <= 1e-4
        final = trajectory.is_final.numpy()
        assert all(final[k, :k].all() for k in range(len(final))), "Proposition 1: k calls make k tokens right"
        grey = (token_colors(trajectory, 2, "red").reshape(-1, 3) == to_rgb(FINAL_TOKEN)).all(axis=1)
        assert grey[trajectory.positions.numpy()].tolist() == final[2].tolist()
    loop, _, jacobi = trajectories.values()
    assert loop.runs == tuple((t, t + 1) for t in range(16)) and loop.residual == 0
    assert jacobi.runs[0] == jacobi.runs[-1] == (0, 16), "first sweep, and the pass that certifies"
    assert np.array_equal(loop.positions, np.arange(16)[::-1]), "block 1 reads in reverse"

    save_animation("a title", trajectories, tmp_path / "front.gif")
    with Image.open(tmp_path / "front.gif") as animation:
        assert animation.format == "GIF" and animation.n_frames > 2
