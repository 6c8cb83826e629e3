"""Guided parameters against the oracle, in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.blocks.guidance import guided
from tests.helpers import oracle
from tests.helpers.problems import latents, make_flow, make_maf, make_star, texts

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_classes": 3}
CLASSLESS: dict[str, Any] = {"image_size": 6, "patch_size": 2, "in_channels": 3}
SHIFTS: dict[str, Any] = {"image_size": 6, "patch_size": 2, "num_classes": 2, "nvp": False, "noise_std": 0.2}
STAR: dict[str, Any] = {"in_channels": 2}
LABELS = torch.tensor([0, -1, 1])


@given(
    config=st.sampled_from([CLASSES, CLASSLESS, SHIFTS, STAR]),
    i=st.integers(0, 1),
    weight=st.floats(0.1, 3),
    annealed=st.booleans(),
    on=st.sampled_from(["both", "scale", "shift"]),
    temperature=st.sampled_from([1.0, 0.7, 1.6]),
    rule=st.sampled_from(["linear", "density"]),
    data=st.data(),
)
def test_the_guided_map_is_the_formula_s(
    config: dict[str, Any], i: int, weight: float, annealed: bool, on: Any, temperature: float, rule: Any,
    data: st.DataObject,
) -> None:  # fmt: skip
    """In one pass, in runs of tokens over a cache, and in a run that starts at a token of each sample's own."""
    is_star, on = config is STAR, on if rule == "linear" else "both"
    flow: Any = make_star(**config) if is_star else make_flow(**config)
    reference = oracle.StarOracle(flow) if is_star else oracle.Oracle(flow)
    x, z = latents(flow, 3, seed=1), latents(flow, 3, seed=2)
    labels = texts(flow, 3) if is_star else LABELS if flow.config.num_classes else None
    block = guided(flow.blocks[i], jf.Guidance(weight, annealed, on, temperature, rule))
    expected = reference.g(i, x, z, labels, oracle.Guide(weight, annealed, on, temperature, rule))
    length = z.shape[1]
    with torch.no_grad():
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))), length]
        cache = block.init_cache(z, jf.Context(labels))
        runs = [block.update(x, z, a, b, cache) for a, b in pairwise(cuts)]
        whole, _ = jf.Problem(block, z, jf.Context(labels)).evaluate(x)
        # All keys are there now: samples may leave, the last one move into a gap, and be swept anywhere.
        cache = block.move_rows(cache, torch.tensor([2]), torch.tensor([0]), 2)
        start = torch.tensor(data.draw(st.lists(st.integers(0, length - 3), min_size=2, max_size=2)))
        run = block.update_at(x[[2, 1]], z[[2, 1]], start, 3, int(start.max()) + 3, cache)
        # And the place of one may be taken by another.
        block.reset_rows(cache, torch.tensor([1]), jf.Context(labels)[:1])
        entered = block.update(x[[2, 0]], z[[2, 0]], 0, length, cache)
    for actual in (torch.cat(runs, dim=1), whole):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for n, (row, first) in enumerate(zip((2, 1), start.tolist(), strict=True)):
        torch.testing.assert_close(run[n], expected[row, first : first + 3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entered, expected[[2, 0]], rtol=1e-10, atol=1e-10)


GUIDED = [
    (name, jf.Guidance(1.5, annealed, on, temperature, rule))
    for name in ("TarFlow", "STARFlow", "MAF")
    for annealed in (False, True)
    for on, rule in (("both", "linear"), ("scale", "linear"), ("shift", "linear"), ("both", "density"))
    for temperature in ((1.0,) if name == "MAF" else (1.0, 0.7))
]


@pytest.mark.parametrize(("name", "guidance"), GUIDED, ids=str)
def test_the_exact_loop_inverts_the_guided_map(name: str, guidance: jf.Guidance) -> None:
    """The certificate evaluates the guided map, and so checks an exact loop that knows of guidance."""
    flow: Any = {"TarFlow": lambda: jf.load("digits-p1"), "STARFlow": lambda: make_star(**STAR).float(),
                 "MAF": lambda: jf.load("digits-maf")}[name]()  # fmt: skip
    context = jf.Context(texts(flow, 3).float() if name == "STARFlow" else torch.tensor([0, 3, -1]))
    block, z = guided(flow.blocks[-1], guidance), latents(flow, 3).float()
    solution = jf.solve(block, z, jf.Solver(jf.Sequential()), context, certify="always")
    assert solution.residual.max() < 1e-4 * solution.x.abs().max()
    unguided = jf.solve(flow.blocks[-1], z, jf.Solver(jf.Sequential()), context)
    assert (solution.x - unguided.x).abs().max() > 1e-3


def test_a_guided_flow_is_a_view() -> None:
    flow = make_flow(**CLASSES)
    view = flow.guided(jf.Guidance(2.0))
    assert view.guidance == jf.Guidance(2.0)
    assert all(view.inverse_block(i).block is block for i, block in enumerate(flow.blocks))
    assert flow.guidance is view.guided(None).guidance is view.guided(jf.Guidance(0.0)).guidance is None
    for plain in (view.guided(None), view.guided(jf.Guidance(0.0))):
        assert all(plain.inverse_block(i) is block for i, block in enumerate(flow.blocks))
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view.log_prob(x, LABELS[:2]), flow.log_prob(x, LABELS[:2]))
    view.double().var.fill_(4)
    assert (flow.var == 4).all()


def test_only_a_flow_with_attention_has_an_attention_temperature() -> None:
    with pytest.raises(ValueError, match=r"attn_temperature=0\.5: a MAFBlock has no attention"):
        make_maf().guided(jf.Guidance(1.0, attn_temperature=0.5))
