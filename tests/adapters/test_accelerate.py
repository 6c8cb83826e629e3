"""`jf.accelerate` on the flows of all libraries against their own inverses; what it finds, refuses and reports."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import glasflow
import glasflow.nflows.transforms as gf
import nflows.transforms
import pytest
import torch
import zuko
from pyro.distributions.transforms import affine_autoregressive, affine_coupling, conditional_affine_autoregressive
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.adapters import registry
from jacobiflow.native.library import Library
from tests.helpers.library_flows import CASES, CONTEXT, MASKED, both, normal, problem_of, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MASKED)
def test_tolerance_0_gives_the_bits_of_the_library(name: str) -> None:
    case = CASES[name]
    for dtype, context, rows in ((torch.float32, CONTEXT, 7), (torch.float64, 0, 1), (torch.float32, CONTEXT, 2000)):
        features = min(case.features, 24 if rows < 2000 else 6)
        flow, y = case.make(context, features, dtype), normal(rows, features, dtype=dtype)
        c = normal(rows, context, seed=1, dtype=dtype) if context else None
        with torch.no_grad():
            expected, result, passes, original = both(case, flow, y, c)
            with jf.accelerate(flow, 0.0):  # without the hooks that count, so from the answer of native code
                assert same_bits(expected, case.invert(flow, y, c))
        assert same_bits(expected, result)
        assert all(x.isfinite().all() for x in expected)
        assert set(original.values()) == {features}
        assert features < 24 or dtype != torch.float32 or all(2 < count < 24 for count in passes.values())


@torch.no_grad()
def test_four_functions_lead_from_a_flow_of_zuko_to_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    package, evaluate_chain = str(Path(jf.__file__).parent), Library.evaluate_chain
    depths: list[int] = []

    def counted(*args: Any) -> int:
        depths.append(1 + sum(frame.filename.startswith(package) for frame in inspect.stack(context=0)))
        return evaluate_chain(*args)

    monkeypatch.setattr(Library, "evaluate_chain", counted)
    _, flow, y, c = problem_of("zuko MAF")
    with jf.accelerate(flow):
        flow(c).sample((2,))
        flow(c).log_prob(y)
    assert len(depths) == 2 and max(depths) <= 4


def test_the_handle_says_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    _, flow, y, c = problem_of("zuko MAF")
    flow.transform.transforms[1].hyper[1] = nn.Mish()
    handle = jf.accelerate(flow)
    first, second, both_of = (
        f"  transform.transforms.{names}: zuko MaskedAutoregressiveTransform, by " for names in ("0", "1", "0, 1")
    )
    assert str(handle).splitlines() == [
        "accelerated, exact to rounding: 2 transforms", first + "native code",
        second + "passes, if there are 6 features or more: native code does not take the activation Mish",
    ]  # fmt: skip
    assert (handle.tolerance, handle.reasons, handle.passes, handle.backends) == (None, {}, {}, {})
    with torch.no_grad():
        flow(c).transform.inv(y)
    assert handle.backends == {"transform.transforms.0": "native", "transform.transforms.1": "passes"}
    assert handle.passes["transform.transforms.0"] == 0 < handle.passes["transform.transforms.1"] < 24
    assert "to a tolerance of 0.001" in str(jf.accelerate(flow, 1e-3))
    assert str(jf.accelerate(flow, 0.0)).splitlines()[1:] == [both_of + "passes"]
    monkeypatch.setenv("JACOBIFLOW_NATIVE", "0")
    off = "passes, if there are 6 features or more: native code is off, by JACOBIFLOW_NATIVE=0"
    assert both_of + off in str(jf.accelerate(flow))


def test_the_handle_prints_few_lines_for_many_transforms_and_large_networks() -> None:
    many = jf.accelerate(zuko.flows.MAF(2, transforms=20))
    assert len(str(many).splitlines()) == 2 and "transform.transforms.0, 1, 2, 3, 4, 5, 6, ..., 19: zuko" in str(many)
    two = jf.accelerate({name: zuko.flows.MAF(2, transforms=2) for name in "ab"})
    assert "  a.transform.transforms.0, 1; b.transform.transforms.0, 1: zuko" in str(two)
    neural = jf.accelerate(zuko.flows.NAF(2))
    assert str(neural).splitlines()[1].endswith("by passes: native code does not take the univariate MNN")


def test_the_handle_is_not_the_flow() -> None:
    with pytest.raises(AttributeError, match=r"Acceleration has no 'sample'; the flow itself .*: call flow\.sample"):
        jf.accelerate(zuko.flows.MAF(2)).sample  # noqa: B018


@pytest.mark.parametrize("name", ["zuko MAF", "zuko coupling"])
@torch.no_grad()
def test_the_handle_says_why_the_latest_call_was_not_native(name: str) -> None:
    _, flow, y, c = problem_of(name)
    handle = jf.accelerate(flow)
    with torch.autocast("cpu", torch.bfloat16):
        flow(c).log_prob(y)
    assert "in the latest call by its own code: torch.autocast was enabled (call it outside of autocast)" in str(handle)
    flow(c).log_prob(y)
    assert str(handle).endswith("by native code")


def test_flows_within_objects_are_found() -> None:
    names = ("zuko MAF", "zuko NSF", "nflows affine", "nflows rational", "normflows affine")
    flows = [CASES[name].make() for name in names]
    holder = SimpleNamespace(
        several=[flows[1].transform, SimpleNamespace(inner=flows[2])], pair=(flows[3], 3), word="x",
        first=flows[0].transform, nested=[SimpleNamespace(inner=SimpleNamespace(flow=flows[4]))], again=[flows[0]],
    )  # fmt: skip
    with jf.accelerate({"a": flows[0].transform, 2: {"b": flows[2]}}) as handle:
        assert set(handle.transforms) == {"a.transforms.0", "a.transforms.1", "2.b"}
    with jf.accelerate(holder, 0.0) as handle:
        layers = [f"{name}.transforms.{i}" for name in ("first", "several.0") for i in (0, 1)]
        assert set(handle.transforms) == {*layers, "several.1.inner", "pair.0", "nested.0.inner.flow"}
        assert {what.split()[0] for what in handle.transforms.values()} == {"zuko", "nflows", "normflows"}
        flows[2].inverse(normal(3, 24))
        assert list(handle.passes) == ["several.1.inner"]


class OverriddenInverse(nflows.transforms.MaskedAffineAutoregressiveTransform):
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return super().inverse(2 * inputs, context)


STABLE = conditional_affine_autoregressive(8, 2, [32], stable=True)


@pytest.mark.parametrize(
    ("flow", "why"),
    [(OverriddenInverse(8, 16), "OverriddenInverse overrides nflows's inverse"),
     (affine_autoregressive(8, [32], stable=True), "its _inverse was replaced"),
     (STABLE, "stable=True replaces the methods of its transforms")],
)  # fmt: skip
def test_skipped_transforms_are_reported_with_the_reason(flow: nn.Module, why: str) -> None:
    kind = type(flow)
    alone = jf.accelerate(nn.ModuleList([flow]))
    assert (alone.transforms, alone.reasons) == ({}, {"0": why})
    with jf.accelerate(nn.ModuleDict({"first": flow, "second": CASES["normflows affine"].make()})) as handle:
        assert type(flow) is kind
    assert handle.reasons == {"first": why}
    assert handle.transforms == {"second": "normflows MaskedAffineAutoregressive"}
    assert f"  first: left alone, {why}" in str(handle)


def test_the_handle_notices_an_option_that_ends_the_acceleration() -> None:
    flow = conditional_affine_autoregressive(8, 2, [32])
    handle = jf.accelerate(flow)
    flow.kwargs["stable"] = True
    assert str(handle).endswith("by the library: stable=True replaces the methods of its transforms")


@pytest.mark.filterwarnings("ignore:.*nothing was accelerated")
@pytest.mark.parametrize("name", CASES)
def test_a_flow_without_values_is_left_alone(name: str) -> None:
    flow = CASES[name].make().to("meta")
    kinds = [type(part) for part in flow.modules()]
    handle = jf.accelerate(flow)
    assert [type(part) for part in flow.modules()] == kinds
    assert {*handle.reasons.values()} == {"its tensors are on meta"}


def test_scales_of_glasflow_by_a_function_of_the_user_are_refused() -> None:
    flow = gf.MaskedAffineAutoregressiveTransform(5, 16)
    copied, y = copy.deepcopy(flow), normal(3, 5)
    with torch.no_grad(), jf.accelerate(glasflow), jf.accelerate(copied) as handle:
        torch.testing.assert_close(copied.inverse(y), flow.inverse(y))
        assert handle.backends == {"": "native"}
        own = jf.accelerate(gf.MaskedAffineAutoregressiveTransform(5, 16, scale_activation=torch.exp))
    assert str(own).endswith("native code does not take the scale_activation exp")


NO_RESIDUAL_NET = "native code does not take the network Linear"
OTHER_SPLIT = "native code does not take a coupling that splits another dimension than the last"
NO_TRANSFORM = (
    "it has no transform of zuko, nflows, glasflow, normflows, pyro that can be accelerated, and no TarFlow block"
)


@pytest.mark.parametrize(
    ("flow", "why"),
    [(affine_coupling((4, 2), dim=-2), OTHER_SPLIT),
     (nflows.transforms.AffineCouplingTransform(torch.arange(8) % 2, nn.Linear), NO_RESIDUAL_NET),
     (zuko.flows.CNF(2), NO_TRANSFORM), ([nn.Linear(2, 2)], NO_TRANSFORM),
     (jf.MAF(jf.MAFConfig(1, 2, hidden_features=4, num_blocks=1)), "jf.sample and jf.decode make it fast")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_made_faster_is_left_as_it_is_with_the_reason(flow: Any, why: str) -> None:
    def kinds() -> list[Any]:
        return [
            type(part)
            for module in nn.ModuleList(flow if isinstance(flow, list) else [flow])
            for part in module.modules()
        ]

    before = kinds()
    with jf.accelerate(flow) as handle:
        assert kinds() == before
    handle.restore()
    assert kinds() == before
    assert (handle.transforms, handle.reasons, handle.backends) == ({}, {"": why}, {})
    assert str(handle) == f"nothing was accelerated\n  left alone, {why}"
    with pytest.warns(UserWarning, match=f"{type(flow).__name__}: nothing was accelerated\n  left alone, {why}"):
        jf.accelerate(flow)


def test_what_is_no_flow_is_refused() -> None:
    for value in (None, zuko.flows.MAF, "zuko", SimpleNamespace(a=1)):
        with pytest.raises(TypeError, match="no PyTorch module in it; give a flow or a posterior"):
            jf.accelerate(value, 0.0)
    for path in ("x.pth", Path("x.pth")):
        with pytest.raises(TypeError, match=r"jacobiflow convert, or call jf.TarFlow.from_original\('x.pth'\)"):
            jf.accelerate(path)
    _, flow, _, c = problem_of("zuko MAF")
    for product in (flow(c), flow(c).transform):
        with pytest.raises(jf.InputError, match="accelerate the flow that made it, if one did; nothing"):
            jf.accelerate(product, 0.0)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("zuko MAF", "1.3.0 1.3rc1 1.99.3", "1.2.0 2.0 0.9"), ("nflows affine", "0.14", "0.13 0.15.0"),
     ("normflows affine", "1.7.0.post1", "1.6.9 2.0.0rc1")],
)  # fmt: skip
def test_versions(name: str, good: str, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, flow = name.split()[0], CASES[name].make()
    kind, have = type(flow), {}  # a KeyError for another library, whose version does not matter
    monkeypatch.setattr(registry, "version", have.__getitem__)
    for have[library] in good.split():
        jf.accelerate(flow, 0.0).restore()
    for have[library] in bad.split():
        with pytest.raises(ValueError, match=rf"{library} {have[library]}: supported are \d.* to below \d.*; nothing"):
            jf.accelerate(flow, 0.0)
    assert type(flow) is kind
