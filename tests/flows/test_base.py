"""Runs of tokens that start where each sample stands."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacobiflow.flows.base import put_run, run_of


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_runs_are_read_and_written_at_the_start_of_each_sample(data: st.DataObject) -> None:
    batch, length, size = (data.draw(st.integers(1, n)) for n in (3, 5, 5))
    size = min(size, length)
    starts = data.draw(st.lists(st.integers(0, length - size), min_size=batch, max_size=batch))
    x = torch.arange(batch * length * 2).view(batch, length, 2)
    for start in [torch.tensor(starts)] + starts[:1] * (len(set(starts)) == 1):
        run = run_of(x, start, size)
        assert run.tolist() == [x[b, first : first + size].tolist() for b, first in enumerate(starts)]
        changed = x.clone()
        put_run(changed, -run, start)
        inside = torch.tensor([[first <= t < first + size for t in range(length)] for first in starts]).unsqueeze(-1)
        assert torch.equal(changed, torch.where(inside, -x, x))
