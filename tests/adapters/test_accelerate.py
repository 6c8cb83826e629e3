"""`jf.accelerate` on the flows of all libraries against their own inverses; what it finds, refuses and reports."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import nflows.transforms
import pytest
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st
from library_flows import BISECTION, CASES, CONTEXT, MAIN, Additive, Case, angles, both, made, normal, same_bits
from torch import Tensor, nn

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_tolerance_0_gives_the_bits_of_the_library(name: str) -> None:
    case = CASES[name]
    for dtype, context, shape in ((torch.float32, CONTEXT, (7,)), (torch.float64, 0, (1,))):
        flow = case.make(context, dtype=dtype)
        y = case.inputs(*shape, case.features, dtype=dtype)
        c = normal(*shape, context, seed=1, dtype=dtype) if context else None
        with torch.no_grad():
            expected, found, passes, own = both(case, flow, y, c)
            with jf.accelerate(flow):  # without the hooks that count, which keep a layer's product in each pass
                assert same_bits(expected, case.invert(flow, y, c))
        assert same_bits(expected, found)
        assert all(x.isfinite().all() for x in expected)
        assert set(own.values()) == {case.passes or case.features}
        if case.features == 24 and case.passes is None and dtype == torch.float32:
            assert all(2 < count < 24 for count in passes.values())


@pytest.mark.parametrize("tolerance", [1e-9, 1e-6])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_of_the_order_of_the_tolerance(name: str, tolerance: float) -> None:
    case, flow, y, c = made(name, torch.float64)
    bound = 3e3 * max(tolerance, 2e-6 if name in BISECTION else 0.0)  # 3e3: amplification by the steepest flow
    with torch.no_grad():
        expected, found, *_ = both(case, flow, y, c, tolerance)
        with jf.accelerate(flow, tolerance):
            alone = [case.invert(flow, y[i : i + 1], c[i : i + 1]) for i in range(5)]
    for other in (found, [torch.cat(parts) for parts in zip(*alone, strict=True)]):
        gap = expected[0] - other[0]
        if case.inputs is angles:
            gap = torch.remainder(gap + math.pi, 2 * math.pi) - math.pi  # -pi and pi are one angle
        assert gap.abs().max() <= bound
        if case.library != "zuko":
            assert (expected[1] - other[1]).abs().max() <= 24 * bound  # a log-determinant is a sum of 24


@pytest.mark.parametrize("inverse", [False, True], ids=["flow", "inverse flow"])
def test_zuko_distributions_give_the_same_bits(inverse: bool) -> None:
    _, flow, x, c = made("zuko MAF")
    if inverse:  # its slow side is the density
        flow = zuko.lazy.Flow([t.inv for t in flow.transform.transforms], flow.base)

    def calls() -> list[Tensor]:
        torch.manual_seed(5)
        found = [flow(c).log_prob(x), flow(c).sample((3,)), *flow(c).rsample_and_log_prob((3,))]
        return [*found, torch.get_rng_state()]

    expected = calls()
    with jf.accelerate(flow) as done:
        assert same_bits(expected, calls())
    assert len(done.passes) == 2
    assert all(2 < count < 24 for count in done.passes.values())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(2, 12), st.integers(0, 3), st.integers(0, 999), st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    st.fixed_dictionaries({
        "hidden_features": st.lists(st.integers(12, 20), min_size=1, max_size=3), "randperm": st.booleans(),
        "passes": st.sampled_from([None, 2, 3, 40]),
    }),
)  # fmt: skip
def test_any_small_maf_keeps_its_bits(features: int, context: int, seed: int, gain: float, sizes: Any) -> None:
    case = Case("zuko", lambda d, c: zuko.flows.MAF(d, c, transforms=2, **sizes), gain)
    y, c = normal(4, features, seed=seed), normal(4, context, seed=seed + 1) if context else None
    with torch.no_grad():
        expected, found, *_ = both(case, case.make(context, features, seed=seed), y, c)
    assert same_bits(expected, found)


def test_threads_on_one_flow_get_what_each_gets_alone() -> None:
    case, exact, *_ = made("nflows affine")
    rough = case.make(CONTEXT)
    jf.accelerate(rough, 0.3)
    rows = [(normal(3 + i % 4, 24, seed=i), normal(3 + i % 4, CONTEXT, seed=i)) for i in range(16)]
    work = [(flow, *row) for row in rows for flow in (exact, rough)]

    def answer(item: tuple[nn.Module, Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            return case.invert(*item)[0]

    expected = [answer(item) for item in work]
    assert not same_bits(expected[0], expected[1])
    with jf.accelerate(exact), ThreadPoolExecutor(8) as pool:
        assert same_bits(expected, list(pool.map(answer, work)))


# ------------------------------------------------------------------------------------------------------ what is found


def test_the_handle_says_what_was_done() -> None:
    _, flow, y, c = made("zuko MAF")
    done = jf.accelerate(flow)
    first, second = done.transforms
    assert (first, second) == ("transform.transforms.0", "transform.transforms.1")
    assert str(done).splitlines() == [
        "accelerated to identical bits: 2 masked autoregressive transforms",
        f"  {first}: zuko MaskedAutoregressiveTransform",
        f"  {second}: zuko MaskedAutoregressiveTransform",
    ]
    flow(c).log_prob(y)
    assert (done.tolerance, done.untouched, done.passes) == (0, {}, {})
    flow.transform.transforms[1](c).inv(y)
    assert list(done.passes) == [second]
    assert "to a tolerance of 0.001" in str(jf.accelerate(flow, 1e-3))


def test_flows_within_objects_are_found() -> None:
    flows = [CASES[name].make() for name in MAIN[:5]]
    holder = SimpleNamespace(
        several=[flows[1].transform, SimpleNamespace(inner=flows[2])], pair=(flows[3], 3), word="x",
        first=flows[0].transform, deep=[[SimpleNamespace(too=flows[4])]], again=[flows[0]],
    )  # fmt: skip
    with jf.accelerate(holder) as done:
        assert set(done.transforms) == {"first.transforms.0", "first.transforms.1", "several.0.transforms.0",
                                        "several.0.transforms.1", "several.1.inner", "pair.0"}  # fmt: skip
        assert {what.split()[0] for what in done.transforms.values()} == {"zuko", "nflows"}
        flows[2].inverse(normal(3, 24))
        assert list(done.passes) == ["several.1.inner"]


class OverriddenInverse(nflows.transforms.MaskedAffineAutoregressiveTransform):
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return super().inverse(2 * inputs, context)


class OverriddenForward(zuko.flows.MaskedAutoregressiveTransform):
    def forward(self, c: Tensor | None = None) -> Any:
        return super().forward(c).inv


def replaced(entry: str, flow: nn.Module) -> nn.Module:
    setattr(flow, entry, lambda *args: args)
    return flow


@pytest.mark.parametrize(
    ("flow", "why"),
    [
        (OverriddenInverse(8, 16), "OverriddenInverse overrides nflows's inverse"),
        (OverriddenForward(8), "OverriddenForward overrides zuko's forward"),
        (replaced("inverse", Additive(8)), "its inverse was replaced"),
        (replaced("forward", zuko.flows.MaskedAutoregressiveTransform(8)), "its forward was replaced"),
    ],
)
def test_what_is_left_alone_is_said_and_why(flow: nn.Module, why: str) -> None:
    kind = type(flow)
    with pytest.raises(ValueError, match=f"ModuleList: no masked .*; 0: {why}; nothing was changed"):
        jf.accelerate(nn.ModuleList([flow]))
    with jf.accelerate(nn.ModuleDict({"first": flow, "second": CASES["normflows affine"].make()})) as done:
        assert type(flow) is kind
    assert done.untouched == {"first": why}
    assert done.transforms == {"second": "normflows MaskedAffineAutoregressive"}
    assert f"  first: left alone, {why}" in str(done)


NOTHING = (zuko.flows.RealNVP(8), zuko.flows.MAF(1), nn.Linear(3, 3), None, zuko.flows.MAF,
           nflows.transforms.AffineCouplingTransform(torch.arange(8) % 2, nn.Linear),
           SimpleNamespace(a=1, b=[nn.Linear(2, 2)]))  # fmt: skip


@pytest.mark.parametrize("flow", NOTHING, ids=lambda flow: type(flow).__name__)
def test_what_has_nothing_to_accelerate(flow: Any) -> None:
    with pytest.raises(ValueError, match="no masked autoregressive transform of zuko, nflows, normflows in it"):
        jf.accelerate(flow)


@pytest.mark.parametrize("tolerance", [-1e-9, math.nan, math.inf, True, "0", None])
def test_a_bad_tolerance_changes_nothing(tolerance: Any) -> None:
    flow = Additive(8)
    with pytest.raises(ValueError, match=f"tolerance={tolerance!r}: give 0"):
        jf.accelerate(flow, tolerance)
    assert type(flow) is Additive


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("zuko MAF", ("1.2.0", "1.99.3"), ("1.1.0", "2.0", "0.9")), ("nflows affine", ("0.14",), ("0.13", "0.15.0")),
     ("normflows affine", ("1.7.0.post1",), ("1.6.9", "2.0.0rc1"))],
)  # fmt: skip
def test_versions(name: str, good: Any, bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library, flow = name.split()[0], CASES[name].make()
    kind, have = type(flow), {}  # a KeyError for another library, whose version does not matter
    monkeypatch.setattr(sys.modules["jacobiflow.adapters.accelerate"], "version", have.__getitem__)
    for number in good:
        have[library] = number
        with jf.accelerate(flow) as done:
            assert done.transforms
    for number in bad:
        have[library] = number
        with pytest.raises(ValueError, match=rf"{library} {number}: supported are \d.* to below \d.*nothing was"):
            jf.accelerate(flow)
        assert type(flow) is kind
