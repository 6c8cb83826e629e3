"""Runs of tokens."""

from __future__ import annotations

import torch

from jacobiflow.blocks.tokens import gather_run, scatter_run


def test_runs_are_read_and_written_at_the_start_of_each_sample() -> None:
    x, starts = torch.arange(1, 25).view(3, 4, 2), [0, 2, 1]
    for start, firsts in ((torch.tensor(starts), starts), (1, [1, 1, 1])):
        run = torch.stack([x[b, first : first + 2] for b, first in enumerate(firsts)])
        assert torch.equal(gather_run(x, start, 2), run)
        changed = x.clone()
        scatter_run(changed, -run, start)
        assert torch.equal(gather_run(changed, start, 2), -run)
        assert (changed < 0).sum() == run.numel()
