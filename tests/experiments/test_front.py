"""The trajectory of a block's solve: the state of every call, and where it ends."""

from __future__ import annotations

import numpy as np
import torch
from problems import latents, make_flow

import jacobiflow as jf
from jacobiflow.experiments.front import record


def test_trajectories_end_at_the_exact_images_and_settle_token_by_token() -> None:
    flow, guidance = make_flow(num_classes=3, noise_std=0.1, num_blocks=3), jf.Guidance(0.4)
    z, labels = latents(flow, 3), torch.tensor([0, 2, 1])
    trajectories = record(flow, 1, z, labels, guidance, denoise=1.0, tolerance=1e-4)
    assert list(trajectories) == ["sequential", "window:2", "jacobi"]
    exact = jf.sample(
        flow, latents=z, labels=labels, strategy="sequential", guidance=guidance, denoise=1.0, progress=False
    ).images
    one = next(i for i in range(3) if torch.allclose(exact[i], trajectories["sequential"].images[-1], atol=1e-9))
    for trajectory in trajectories.values():
        assert (trajectory.block, trajectory.label) == (1, int(labels[one]))
        assert trajectory.after == tuple(range(trajectory.calls + 1)) and len(trajectory.states) == len(
            trajectory.images
        )
        assert (trajectory.images[-1] - exact[one]).abs().max() < 0.05
        assert trajectory.certificate <= 1e-4
        settled = trajectory.settled.numpy()
        assert settled[-1].all() and (np.diff(settled.astype(int), axis=0) >= 0).all()
        assert all(settled[k, :k].all() for k in range(16)), "Proposition 1: k calls make k tokens right"
    loop, jacobi = trajectories["sequential"], trajectories["jacobi"]
    assert loop.runs == tuple((t, t + 1) for t in range(16)) and loop.certificate == 0
    assert all(torch.equal(loop.states[k, :k], loop.states[-1, :k]) for k in range(17))
    assert jacobi.runs[0] == jacobi.runs[-1] == (0, 16), "first sweep, and the pass that certifies"
    assert jacobi.token_evaluations == sum(stop - start for start, stop in jacobi.runs) > 16
    assert loop.positions.tolist() == list(reversed(range(16))), "block 1 reads in reverse"


def test_the_sample_is_the_one_of_the_median_of_sweeps() -> None:
    flow = make_flow()
    z = latents(flow, 5)
    alone = [record(flow, 1, z[row : row + 1])["jacobi"].calls for row in range(5)]
    assert len(set(alone)) > 1
    assert record(flow, 1, z)["jacobi"].calls == sorted(alone)[2]
