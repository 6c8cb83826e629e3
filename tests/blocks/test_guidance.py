"""Guided parameters against the oracle, in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
TEMPERATURES = st.sampled_from([1.0, 0.7, 1.6])


@dataclass
class Case:
    """A guided block, tokens, and its map of them by the oracle."""

    block: Any
    x: Tensor
    z: Tensor
    context: jf.Context
    expected: Tensor

    def assert_close(self, actual: Tensor, rows: Any = slice(None), entries: slice = slice(None)) -> None:
        torch.testing.assert_close(actual, self.expected[rows][:, entries], rtol=1e-10, atol=1e-10)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    config = draw(st.sampled_from([CLASSES, CLASSLESS, SHIFTS, STAR]))
    i, weight, annealed = draw(st.integers(0, 1)), draw(st.floats(0.1, 3)), draw(st.booleans())
    rule = draw(st.sampled_from(["linear", "density"]))
    on: Any = draw(st.sampled_from(["both", "scale", "shift"])) if rule == "linear" else "both"
    own, temperature = draw(TEMPERATURES), draw(TEMPERATURES)
    is_star = config is STAR
    flow: Any = make_star(**config) if is_star else make_flow(**config)
    reference = oracle.StarOracle(flow) if is_star else oracle.Oracle(flow)
    x, z = latents(flow, 3, seed=1), latents(flow, 3, seed=2)
    labels = texts(flow, 3) if is_star else LABELS if flow.config.num_classes else None
    return Case(
        guided(flow.blocks[i], jf.Guidance(weight, annealed, on, temperature, rule)), x, z,
        jf.Context(labels, None if own == 1 else z.new_full((3,), own)),
        reference.g(i, x, z, labels, oracle.Guide(weight, annealed, on, temperature, rule), own),
    )  # fmt: skip


@given(cases())
@torch.no_grad()
def test_one_pass_is_the_formula_s(case: Case) -> None:
    case.assert_close(jf.Problem(case.block, case.z, case.context).evaluate(case.x)[0])


@given(cases(), st.data())
@torch.no_grad()
def test_runs_of_tokens_over_a_cache_are_the_formula_s(case: Case, data: st.DataObject) -> None:
    length = case.z.shape[1]
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))), length]
    cache = case.block.init_cache(case.z, case.context)
    runs = [case.block.update(case.x, case.z, a, b, cache) for a, b in pairwise(cuts)]
    case.assert_close(torch.cat(runs, dim=1))


@given(cases(), st.lists(st.integers(0, 6), min_size=2, max_size=2))
@torch.no_grad()
def test_a_sample_may_leave_and_each_of_the_others_stand_at_a_token_of_its_own(case: Case, starts: list[int]) -> None:
    """The last sample moves to the place of the first."""
    cache = full_cache(case)
    cache = case.block.move_rows(cache, torch.tensor([2]), torch.tensor([0]), 2)
    run = case.block.update_at(case.x[[2, 1]], case.z[[2, 1]], torch.tensor(starts), 3, max(starts) + 3, cache)
    for n, (row, start) in enumerate(zip((2, 1), starts, strict=True)):
        case.assert_close(run[n : n + 1], [row], slice(start, start + 3))


@given(cases())
@torch.no_grad()
def test_a_sample_may_take_the_place_of_another(case: Case) -> None:
    cache = full_cache(case)
    case.block.reset_rows(cache, torch.tensor([1]), case.context[:1])
    rows = [0, 0, 2]
    case.assert_close(case.block.update(case.x[rows], case.z[rows], 0, case.z.shape[1], cache), rows)


def full_cache(case: Case) -> Any:
    """A cache that has all keys."""
    cache = case.block.init_cache(case.z, case.context)
    case.block.update(case.x, case.z, 0, case.z.shape[1], cache)
    return cache


RULES = [jf.Guidance(1.5), jf.Guidance(1.5, on="scale"), jf.Guidance(1.5, on="shift"), jf.Guidance(1.5, rule="density")]
EXACT = [
    (name, replace(guidance, attn_temperature=temperature), own)
    for name in ("TarFlow", "STARFlow", "MAF")
    for guidance in RULES
    for temperature, own in (((1.0, None),) if name == "MAF" else product((1.0, 0.7), (None, 1.3)))
]


@pytest.mark.parametrize("unconditional", [None, torch.zeros_like, lambda values: values.roll(1, 0)])
@pytest.mark.parametrize(("name", "guidance", "own"), EXACT, ids=str)
def test_the_exact_loop_inverts_the_guided_map(
    name: str, guidance: jf.Guidance, own: float | None, unconditional: Callable[[Tensor], Tensor] | None
) -> None:
    """The certificate evaluates the guided map, and so checks an exact loop that knows of guidance."""
    flow: Any = {"TarFlow": lambda: jf.load("digits-p1"), "STARFlow": lambda: deepcopy(make_star(**STAR)).float(),
                 "MAF": lambda: jf.load("digits-maf")}[name]()  # fmt: skip
    values = texts(flow, 3).float() if name == "STARFlow" else torch.tensor([0, 3, -1])
    context = jf.Context(values, None if own is None else torch.full((3,), own))
    plain, z, solver = flow.blocks[-1], latents(flow, 3).float(), jf.Solver(jf.Sequential())
    if unconditional is not None:
        plain.unconditional = unconditional
    block = guided(plain, guidance)
    solution = jf.solve(block, z, solver, context, certify="always")
    assert solution.residual.max() < 1e-4 * solution.x.abs().max()
    is_refused = name == "MAF" and (guidance.rule == "density" or unconditional not in (None, torch.zeros_like))
    assert solution.backend == ("sweeps" if is_refused else "native")
    assert torch.equal(jf.solve(block, z, solver, context).x, solution.x)
    assert (solution.x - jf.solve(plain, z, solver, context).x).abs().max() > 1e-3


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


def test_a_block_without_a_guided_inverse_is_solved_by_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_maf()
    monkeypatch.setattr(type(flow.blocks[0]), "guided_inverse", jf.AffineBlock.guided_inverse)
    block = guided(flow.blocks[0], jf.Guidance(1.0))
    solution = jf.solve(block, latents(flow, 3), jf.Solver(jf.Sequential()), LABELS, certify="always")
    assert (solution.backend, solution.obstacle) == ("sweeps", "MAFBlock has no guided_inverse")
    assert solution.residual.max() < 1e-10
