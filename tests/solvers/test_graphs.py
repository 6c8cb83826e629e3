"""The loop on fixed memory; tests/test_device.py has its graphs."""

from __future__ import annotations

import pytest
import torch

import jacobiflow as jf
from jacobiflow.flows.guidance import guided
from jacobiflow.solvers import graphs
from tests.helpers.problems import latents, make_flow

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.tensor([0, 2, -1, 1, 0])


@pytest.mark.parametrize(("bucket", "guidance"), [(1, None), (5, jf.Guidance(0.6, attn_temperature=1.5)), (64, None)])
@pytest.mark.parametrize("slots", [5, 2])
def test_steps_at_rounded_contexts_are_the_sequential_loop(
    guidance: jf.Guidance | None, bucket: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_BUCKET", bucket)
    flow = make_flow(num_classes=3)
    block, z = guided(flow.blocks[1], guidance), latents(flow, 5)
    exact = jf.solve(block, z, jf.Solver(jf.Sequential()), LABELS).x
    with torch.no_grad():
        torch.testing.assert_close(graphs.solve_by_tokens(block, z, LABELS, slots), exact, rtol=0, atol=1e-12)
