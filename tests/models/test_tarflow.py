"""The blocks of a TarFlow against the oracle, in float64: runs over a cache, temperatures, bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from tests.helpers.oracle import Oracle
from tests.helpers.problems import latents, make_flow

pytestmark = pytest.mark.usefixtures("one_thread")

FLOWS: list[dict[str, Any]] = [{"image_size": 6, "num_classes": 3}, {"image_size": 6, "in_channels": 3, "nvp": False}]
LABELS = torch.tensor([0, -1, 2, 1])
CONFIG = jf.TarFlowConfig(1, 8, 2, width=32, num_blocks=2, layers_per_block=1, head_dim=16)


def close(actual: Any, expected: Any) -> None:
    for have, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@given(st.data())
def test_a_run_after_its_prefix_is_the_full_pass(data: st.DataObject) -> None:
    flow = make_flow(**data.draw(st.sampled_from(FLOWS)))
    i = data.draw(st.integers(0, 1))
    block, labels, length = flow.blocks[i], LABELS if flow.config.num_classes else None, 9
    x, wrong = latents(flow, 4), latents(flow, 4, seed=1)
    weight, size = flow.state_dict()[f"blocks.{i}.proj_out.weight"], flow.config.token_dim
    w_s, w_u = block.output_weights()
    assert torch.equal(w_u, weight[-size:])
    assert torch.equal(w_s, weight[:size]) if flow.config.nvp else w_s is None and len(weight) == size
    temperature = data.draw(st.sampled_from([None, torch.tensor([1.0, 0.5, 2.0, 1.0])]))
    full = Oracle(flow).parameters(i, x, labels, 1.0 if temperature is None else temperature.view(-1, 1, 1, 1))
    copied = x.clone()
    stops = sorted({*data.draw(st.lists(st.integers(1, length), max_size=5)), length})
    cache = block.init_cache(x, jf.Context(labels, temperature))
    with torch.no_grad():
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            if data.draw(st.booleans()):  # values of an earlier sweep are written over
                other = torch.cat((x[:, : max(start - 1, 0)], wrong[:, max(start - 1, 0) :]), dim=1)
                block.affine(other, start, stop, cache)
            close(block.affine(x, start, stop, cache), [p[:, start:stop] for p in full])
        starts = data.draw(st.lists(st.integers(0, length - 3), min_size=2, max_size=2))
        rows = torch.tensor([3, 1])
        cache = block.move_rows(cache, torch.tensor([3]), torch.tensor([0]), 2)
        run = block.affine_at(x[rows], torch.tensor(starts), 3, max(starts) + 3, cache)
    close(run, [torch.stack([p[n, a : a + 3] for n, a in zip([3, 1], starts, strict=True)]) for p in full])
    assert torch.equal(x, copied)


def test_a_large_batch_is_as_each_of_its_samples() -> None:
    """It goes through the network in parts."""
    flow = make_flow(**FLOWS[0])
    x, labels = latents(flow, 800), torch.arange(800) % 3
    block = flow.blocks[1]
    whole = block.affine(x, 0, 9, block.init_cache(x, jf.Context(labels)))
    few = torch.tensor([0, 354, 355, 356, 711, 799])
    close([p[few] for p in whole], Oracle(flow).parameters(1, x[few], labels[few]))
    close([p[few] for p in block(x, labels)], [p[few] for p in whole])


def test_a_lowered_cache_runs_the_network_in_bfloat16() -> None:
    flow = make_flow(**FLOWS[0])
    x, block = latents(flow, 4), flow.blocks[0]
    cache = block.init_cache(x, jf.Context(LABELS))
    full, low = (block.affine(x, 0, 9, c) for c in (cache, block.to_bf16(cache)))
    for exact, rounded in zip(full, low, strict=True):
        assert rounded.dtype == torch.float64
        assert torch.equal(rounded, rounded.bfloat16().double())  # by a network in bfloat16
        assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert cache.layers[0].dtype == torch.float64  # the other cache is as it was


@pytest.mark.parametrize("part", [1, 2], ids=["keys", "values"])
def test_keys_and_values_that_are_not_finite_are_not_hidden(part: int) -> None:
    """They come of weights that are too large for the network's dtype, from tokens that are not."""
    flow = copy.deepcopy(make_flow()).half()
    block, z = flow.blocks[1], latents(flow, 2).float()
    with torch.no_grad():
        block.attn_blocks[0].attention.qkv.weight.view(3, -1)[part].normal_(std=3e4)
    for solver in (jf.Solver(jf.Sequential()), jf.Solver(), jf.Solver(jf.Window(4))):
        assert (jf.solve(block, z, solver).status == jf.Status.NONFINITE).all()
    assert jf.Problem(block, z).residual(z)[0].isinf().all()


def test_a_config_from_the_options_of_training() -> None:
    sizes = {"in_channels": 1, "image_size": 8, "num_classes": 10, "width": 32, "blocks": 2, "layers": 3}
    config = jf.TarFlow.config_from_options(**sizes, head_dim=16, volume_preserving=True, noise_std=0.0)
    assert config == replace(CONFIG, layers_per_block=3, num_classes=10, nvp=False)
    assert jf.TarFlow.config_from_options(**{**sizes, "width": 64}).noise_std == 0.1
    assert [jf.TarFlow(replace(CONFIG, nvp=nvp)).learns_prior for nvp in (True, False)] == [False, True]
