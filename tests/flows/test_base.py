"""What a block says that it can do, and runs of tokens that start where each sample stands."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MixingBlock
from torch import Tensor

import jacobiflow as jf
from jacobiflow.flows.base import AffineFrontPerSample, FrontPerSample, LowPrecision, put_run, run_of


class FrontedBlock(MixingBlock, AffineFrontPerSample):
    """`MixingBlock`, evaluated whole, with a run cut out for each sample."""

    def affine_at(self, x: Tensor, start: Tensor, size: int, end: int, cache: None) -> tuple[Tensor, Tensor]:
        log_scale, shift = (
            torch.stack([row[first : first + size] for row, first in zip(whole, start.tolist(), strict=True)])
            for whole in self.affine(x, 0, x.shape[1], cache)
        )
        return log_scale, shift

    def take(self, cache: None, rows: Tensor) -> None: ...

    def join(self, caches: Sequence[None]) -> None: ...


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_runs_are_read_and_written_at_the_start_of_each_sample(data: st.DataObject) -> None:
    batch, length, size = (data.draw(st.integers(1, n)) for n in (3, 5, 5))
    size = min(size, length)
    starts = data.draw(st.lists(st.integers(0, length - size), min_size=batch, max_size=batch))
    x = torch.arange(batch * length * 2).view(batch, length, 2)
    given_starts = [torch.tensor(starts), starts[0]] if len(set(starts)) == 1 else [torch.tensor(starts)]
    for start in given_starts:
        run = run_of(x, start, size)
        assert run.tolist() == [x[b, first : first + size].tolist() for b, first in enumerate(starts)]
        changed = x.clone()
        put_run(changed, -run, start)
        inside = torch.tensor([[first <= t < first + size for t in range(length)] for first in starts]).unsqueeze(-1)
        assert torch.equal(changed, torch.where(inside, -x, x))


def test_update_at_is_update_at_the_start_of_each_sample() -> None:
    block, generator = FrontedBlock(6, 2), torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 3, 6, 2, generator=generator, dtype=torch.float64)
    whole, starts = block.update(x, z, 0, 6, None), [0, 3, 2]
    run = block.update_at(x, z, torch.tensor(starts), 3, 6, None)
    for n, start in enumerate(starts):
        torch.testing.assert_close(run[n], whole[n, start : start + 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("capability", [jf.AffineBlock, FrontPerSample, LowPrecision, AffineFrontPerSample])
def test_a_block_that_lacks_a_method_is_refused_when_it_is_made(capability: type) -> None:
    with pytest.raises(TypeError, match="abstract method"):
        type("Block", (capability,), {})()
    assert not isinstance(MixingBlock(3, 1), FrontPerSample | LowPrecision)
    assert MixingBlock(3, 1).output_weights() is None
