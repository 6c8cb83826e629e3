"""Blocks of two methods, and runs of tokens that start where each sample stands."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.flows.base import AffineBlock, put_run, run_of


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


def test_an_affine_block_needs_two_methods() -> None:
    """`init_cache(z, context=None)` and `affine`, as docs/your_own_block.md has it."""

    class Echo(AffineBlock):
        def init_cache(self, z: torch.Tensor, context: torch.Tensor | None = None) -> None:
            return None

        def affine(self, x: torch.Tensor, start: int, stop: int, cache: None) -> tuple[torch.Tensor, torch.Tensor]:
            before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, start:stop]
            return 0.5 * before.tanh(), 0.3 * before

    z = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 6, 2)
    solution = jf.solve_certified(Echo(), z, jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-9)))
    x = torch.zeros(2, 2, dtype=torch.float64)
    for t in range(6):
        x = torch.exp(0.5 * x.tanh()) * z[:, t] + 0.3 * x
        torch.testing.assert_close(solution.x[:, t], x, rtol=0, atol=1e-8)
