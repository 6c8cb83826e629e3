"""Guided parameters against the oracle, in float64, and what a guided block says that it can do."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MixingBlock, latents, make_flow
from torch import Tensor

import jacobiflow as jf
from jacobiflow.flows.base import AffineFrontPerSample, FrontPerSample, KeepsNothing, LowPrecision, evaluate
from jacobiflow.guidance import guided

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_classes": 3}
CLASSLESS: dict[str, Any] = {"image_size": 6, "patch_size": 2, "in_channels": 3}
SHIFTS: dict[str, Any] = {"image_size": 6, "patch_size": 2, "num_classes": 2, "nvp": False, "noise_std": 0.2}
LABELS = torch.tensor([0, -1, 1])
CAPABILITIES = (FrontPerSample, LowPrecision, KeepsNothing)


@given(
    config=st.sampled_from([CLASSES, CLASSLESS, SHIFTS]),
    i=st.integers(0, 1),
    weight=st.floats(0.1, 3),
    annealed=st.booleans(),
    on=st.sampled_from(["both", "scale", "shift"]),
    temperature=st.sampled_from([1.0, 0.7, 1.6]),
    data=st.data(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_guided_map_is_the_formula_s(
    config: dict[str, Any], i: int, weight: float, annealed: bool, on: Any, temperature: float, data: st.DataObject
) -> None:
    """In one pass, in runs of tokens over a cache, and in a run that starts at a token of each sample's own."""
    flow = make_flow(**config)
    x, z = latents(flow, 3, seed=1), latents(flow, 3, seed=2)
    labels = LABELS if flow.config.num_classes else None
    block = guided(flow.blocks[i], jf.Guidance(weight, annealed, on, temperature))
    expected = oracle.Oracle(flow).g(i, x, z, labels, oracle.Guide(weight, annealed, on, temperature))
    length = z.shape[1]
    assert isinstance(block, AffineFrontPerSample)
    with torch.no_grad():
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))), length]
        cache = block.init_cache(z, labels)
        runs = [block.update(x, z, a, b, cache) for a, b in pairwise(cuts)]
        whole = evaluate(block, x, z, labels)
        # All keys are there now: samples may leave, the last one move into a gap, and be swept anywhere.
        cache = block.move(cache, torch.tensor([2]), torch.tensor([0]), 2)
        start = torch.tensor(data.draw(st.lists(st.integers(0, length - 3), min_size=2, max_size=2)))
        run = block.update_at(x[[2, 1]], z[[2, 1]], start, 3, int(start.max()) + 3, cache)
        # And the place of one may be taken by another.
        block.refill(cache, torch.tensor([1]), None if labels is None else labels[:1])
        entered = block.update(x[[2, 0]], z[[2, 0]], 0, length, cache)
    for found in (torch.cat(runs, dim=1), whole):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for n, (row, first) in enumerate(zip((2, 1), start.tolist(), strict=True)):
        torch.testing.assert_close(run[n], expected[row, first : first + 3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entered, expected[[2, 0]], rtol=1e-10, atol=1e-10)


def test_the_annealed_weight_rises_from_0_at_the_first_token_to_the_whole_at_the_last() -> None:
    flow = make_flow(**CLASSES)
    x, z = latents(flow, 3, seed=1), latents(flow, 3, seed=2)
    guidances = (None, jf.Guidance(2.0, attn_temperature=0.5), jf.Guidance(2.0, annealed=False, attn_temperature=0.5))
    plain, annealed, constant = (
        block.affine(x, 0, 16, block.init_cache(z, LABELS))[1]
        for block in (guided(flow.blocks[0], guidance) for guidance in guidances)
    )
    share = torch.linspace(0, 1, 16, dtype=torch.float64).view(1, -1, 1)
    torch.testing.assert_close(annealed - plain, share * (constant - plain), rtol=0, atol=1e-10)
    assert (constant[:, 1:] - plain[:, 1:]).abs().amax(dim=(1, 2)).min() > 1e-3  # guidance does something


def test_guidance_of_a_row_without_a_label_does_nothing_at_temperature_1() -> None:
    block, flow = make_flow(**CLASSES).blocks[1], make_flow(**CLASSES)
    x, z = latents(flow, 3, seed=1), latents(flow, 3, seed=2)
    plain, away = (
        b.update(x, z, 0, 16, b.init_cache(z, LABELS)) for b in (block, guided(block, jf.Guidance(2.0, annealed=False)))
    )
    change = (away - plain).abs().amax(dim=(1, 2))
    assert change[1] < 1e-10
    assert change[[0, 2]].min() > 1e-3


class CapableBlock(MixingBlock):
    """`MixingBlock`, to which a capability of any kind may be added."""

    def affine_at(self, x: Tensor, start: Tensor, size: int, end: int, cache: None) -> Any: ...

    def move(self, cache: None, source: Tensor, target: Tensor, num: int) -> None: ...

    def refill(self, cache: None, rows: Tensor, context: Any = None, attn_temperature: Any = None) -> None: ...

    def lower(self, cache: None) -> None: ...


@pytest.mark.parametrize("has", list(product([False, True], repeat=3)))
def test_a_guided_block_can_do_what_its_block_can(has: tuple[bool, bool, bool]) -> None:
    bases = [c for c, wanted in zip((AffineFrontPerSample, LowPrecision, KeepsNothing), has, strict=True) if wanted]
    block = type("Block", (CapableBlock, *bases), {})(4, 1)
    for wrapped in (guided(block, jf.Guidance(1.0)), guided(guided(block, jf.Guidance(1.0)), jf.Guidance(2.0))):
        assert tuple(isinstance(wrapped, capability) for capability in CAPABILITIES) == has
        assert wrapped.output_weights() is None


def test_guidance_that_is_off_leaves_the_block() -> None:
    block = make_flow(**CLASSES).blocks[0]
    assert guided(block, None) is block
    assert guided(block, jf.Guidance(0.0)) is block


def test_the_temperature_of_a_guided_block_is_that_of_its_guidance() -> None:
    inner = guided(make_flow(**CLASSES).blocks[0], jf.Guidance(1.0))
    with pytest.raises(ValueError, match="attn_temperature"):
        guided(inner, jf.Guidance(1.0, attn_temperature=0.5)).init_cache(latents(make_flow(**CLASSES), 2), LABELS[:2])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"weight": -1.0}, "-1.0"),
        ({"weight": math.nan}, "nan"),
        ({"weight": math.inf}, "inf"),
        ({"weight": 1.0, "attn_temperature": 0.0}, "0.0"),
        ({"weight": 1.0, "attn_temperature": math.inf}, "inf"),
        ({"weight": 1.0, "on": "mean"}, "mean"),
    ],
)
def test_guidance_refuses_what_makes_no_sense(values: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        jf.Guidance(**values)
