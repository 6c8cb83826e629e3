"""The course of a block's solve: every call's state, and where it ends."""

from __future__ import annotations

import numpy as np
import torch
from problems import latents, make_flow

import jacobiflow as jf
from jacobiflow.experiments.front import record


def test_courses_end_at_the_exact_images_and_settle_token_by_token() -> None:
    flow, guidance = make_flow(num_classes=3, noise_std=0.1, num_blocks=3), jf.Guidance(0.4)
    z, labels = latents(flow, 3), torch.tensor([0, 2, 1])
    courses = record(flow, 1, z, labels, guidance, denoise=1.0, tolerance=1e-4)
    assert list(courses) == ["sequential", "window:2", "jacobi"]
    exact = jf.sample(
        flow, latents=z, labels=labels, strategy="sequential", guidance=guidance, denoise=1.0, progress=False
    ).images
    one = next(i for i in range(3) if torch.allclose(exact[i], courses["sequential"].images[-1], atol=1e-9))
    for course in courses.values():
        assert (course.block, course.label) == (1, int(labels[one]))
        assert course.after == tuple(range(course.calls + 1)) and len(course.states) == len(course.images)
        assert (course.images[-1] - exact[one]).abs().max() < 0.05
        assert course.certificate <= 1e-4
        settled = course.settled.numpy()
        assert settled[-1].all() and (np.diff(settled.astype(int), axis=0) >= 0).all()
        assert all(settled[k, :k].all() for k in range(16)), "Proposition 1: k calls make k tokens right"
    loop, jacobi = courses["sequential"], courses["jacobi"]
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
