"""Comparisons time what the library draws. No test here asserts how long anything takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.comparison.compare import compare_samplers
from jacobiflow.evaluation import sample_errors
from tests.helpers.problems import latents, make_flow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("guidance", [None, jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)])
def test_results_are_those_of_the_library_s_samples(guidance: jf.Guidance | None) -> None:
    flow = make_flow(num_classes=3).guided(guidance)
    z, labels, done = latents(flow, 3, seed=5), torch.tensor([2, -1, 0]), list[Any]()
    draw = partial(jf.sample, flow, latents=z, labels=labels)
    runs = {"few sweeps": partial(draw, strategy="jacobi-2"), "window": partial(draw, strategy="window:4")}
    comparison = compare_samplers(flow, z, labels, runs, repeats=1, progress=lambda *step: done.append(step))
    names = ["growing cache", "sequential", "few sweeps", "window"]
    assert done == [(i + 1, 10, "timing") for i in range(10)]
    assert (comparison.batch_size, comparison.baselines) == (3, ("growing cache", "sequential"))
    assert [row.strategy for row in comparison.results] == names
    exact = draw(strategy="sequential", certify=False)
    growing, sequential, few, window = comparison.results
    assert comparison.candidates == (few, window)
    assert growing.error == sample_errors(original_sampler(flow)[1](flow, z, labels), exact.images)
    assert growing.error.max < 1e-10
    assert growing.evaluations_per_token is growing.outcome is sequential.outcome.residual is None  # type: ignore[union-attr]
    assert sequential.error.max == 0
    assert sequential.evaluations_per_token == 1
    for row, strategy in ((few, "jacobi-2"), (window, "window:4")):
        want = draw(strategy=strategy)
        assert row.error == sample_errors(want.images, exact.images)
        assert row.evaluations_per_token == want.outcome.token_evaluations / (3 * 16 * flow.config.num_blocks)
        assert row.outcome == want.outcome or row.outcome.residual == want.outcome.residual  # type: ignore[union-attr]
        assert row.to_json()["sweeps"] == [block.sweeps for block in want.stats]
    assert few.error.max > 1e-2 > window.error.max
