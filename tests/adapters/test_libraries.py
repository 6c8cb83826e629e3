"""`jf.accelerate` with a library: all flows that it makes, copies or loads from then on."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import glasflow
import nflows
import normflows
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from torch import Tensor

import jacobiflow as jf
from jacobiflow.adapters import library_acceleration, registry
from jacobiflow.native.library import Library
from tests.adapters.test_accelerate import OverriddenInverse
from tests.adapters.test_copies import saved
from tests.helpers.library_flows import CONTEXT, NATIVE, problem_of, same_bits

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

LIBRARIES: dict[str, Any] = {"zuko": zuko, "nflows": nflows, "glasflow": glasflow, "normflows": normflows, "pyro": pt}
ORIGINALS = {
    adapter.target: dict(vars(adapter.target)) for name in LIBRARIES for adapter in registry.load_adapters(name)
}


def are_restored() -> bool:
    return all(dict(vars(kind)) == original for kind, original in ORIGINALS.items())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each call of native code."""
    calls, evaluate_chain = [], Library.evaluate_chain
    monkeypatch.setattr(Library, "evaluate_chain", lambda *args: calls.append(args) or evaluate_chain(*args))
    return calls


@pytest.mark.parametrize("name", [*NATIVE, "nflows feed-forward", "zuko MAF residual"])
@torch.no_grad()
def test_new_flows_copies_and_loaded_flows_are_accelerated(name: str, calls: list[Any]) -> None:
    case, old, y, c = problem_of(name)
    expected, kinds = case.invert(old, y, c), [type(module) for module in old.modules()]
    with jf.accelerate(LIBRARIES[case.library]):
        new = case.make(CONTEXT)
        flows = [new, copy.deepcopy(new), copy.deepcopy(old), saved(new)]
        assert same_bits(case.invert(old, y, c), expected)
        assert not calls
        for count, flow in enumerate(flows, start=1):
            torch.testing.assert_close(case.invert(flow, y, c), expected, rtol=1e-3, atol=1e-3)
            assert len(calls) == count
    assert all([type(module) for module in flow.modules()] == kinds for flow in flows)
    assert are_restored()


def tolerance_of(flow: Any) -> Any:
    acceleration = getattr(type(flow.transform), "acceleration", None)
    return "library" if acceleration is None else acceleration.tolerance


def test_the_latest_acceleration_counts_and_all_may_end_in_any_order() -> None:
    with jf.accelerate(zuko.flows, 0.5) as outer:
        with jf.accelerate(zuko, 0.0):
            flow = zuko.flows.MAF(3)
            with jf.accelerate(flow, 0.25):
                assert tolerance_of(flow) == 0.25
                jf.accelerate(flow, 0.125)
            assert tolerance_of(flow) == 0.0
        with jf.accelerate(zuko, 0.5) as again:
            assert str(again).endswith("3 transforms so far")  # those of the first call
        assert tolerance_of(flow) == 0.5
        jf.accelerate(flow).restore()
        assert tolerance_of(flow) == "library"
        with jf.accelerate(flow) as first, jf.accelerate(flow):
            first.restore()
        assert tolerance_of(flow) == "library"
    assert str(outer) == "new flows of zuko are accelerated, to a tolerance of 0.5: 3 transforms so far"
    for first, second in ((jf.accelerate(flow), jf.accelerate(flow)), (jf.accelerate(zuko, 0.5), jf.accelerate(zuko))):
        with second, first:
            pass
    assert tolerance_of(flow) == tolerance_of(zuko.flows.MAF(3)) == "library"
    assert are_restored()


def test_what_cannot_be_accelerated_is_left_alone() -> None:
    with jf.accelerate(nflows), jf.accelerate(pt):
        assert type(OverriddenInverse(8, 16)) is OverriddenInverse
        assert type(pt.affine_autoregressive(8, [32], stable=True)) is pt.AffineAutoregressive
        assert type(pt.affine_autoregressive(8, [32])) is not pt.AffineAutoregressive
    with pytest.raises(jf.InputError, match=r"math: supported are .* sbi; if it builds on one of these, pass that"):
        jf.accelerate(math)


def test_a_flow_that_a_thread_makes_meanwhile_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, restored, find_adapter = Event(), Event(), library_acceleration.find_adapter

    def wait(*args: Any) -> Any:
        entered.set()
        restored.wait(0.1)
        return find_adapter(*args)

    monkeypatch.setattr(library_acceleration, "find_adapter", wait)
    with ThreadPoolExecutor(1) as pool:
        handle = jf.accelerate(pt)
        future = pool.submit(pt.affine_autoregressive, 3)
        assert entered.wait(60)
        handle.restore()
        restored.set()
    assert type(future.result()) is pt.AffineAutoregressive


def test_flows_are_freed() -> None:
    with jf.accelerate(zuko):
        flow: Any = zuko.flows.MAF(3)
        flow().sample()
        reference = weakref.ref(flow.transform)
        del flow
        gc.collect()
        assert reference() is None


@pytest.mark.parametrize("estimator", ["maf", "nsf", "zuko_nsf"])
def test_estimators_that_sbi_trains(
    estimator: str, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sbi.inference  # takes two seconds, in every process that collects the tests

    def train() -> Any:
        torch.manual_seed(0)
        prior = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
        theta = prior.sample((200,))
        inference = sbi.inference.NPE(prior, density_estimator=estimator, show_progress_bars=False)
        inference.append_simulations(theta, theta + 0.3 * torch.randn(200, 3)).train(max_num_epochs=1)
        return inference.build_posterior()

    def sample(posterior: Any) -> Tensor:
        torch.manual_seed(0)
        return posterior.sample((50,), x=torch.zeros(1, 3), show_progress_bars=False)

    monkeypatch.chdir(tmp_path)  # sbi logs its training in the folder that it runs in
    posterior = train()
    expected = sample(posterior)
    with jf.accelerate(posterior, 0.0) as handle:
        assert same_bits(sample(posterior), expected)
    assert {what.split()[0] for what in handle.transforms.values()} == {"zuko" if "zuko" in estimator else "nflows"}
    del calls[:]
    with jf.accelerate(sbi):
        torch.testing.assert_close(sample(train()), expected, rtol=1e-3, atol=1e-3)
    assert calls
