"""Plans on a machine whose every second is known: what is planned, and what comes of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.strategy.plan import rounding_floor
from tests.helpers.invented import GUIDANCE, TOKENS, Machine, draw, small, tuned

pytestmark = pytest.mark.usefixtures("one_thread")

LATENTS = draw_latents(4, TOKENS, 4, seed=11)
MACHINES = {"dear calls": Machine(1.0, 0.001), "bfloat16": Machine(1.0, 0.001, 0.01), "dear tokens": Machine(0.1, 0.1)}


def is_loop(*solvers: jf.Solver) -> bool:
    return all(solver.partition == jf.Sequential() for solver in solvers)


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
@pytest.mark.parametrize("name", MACHINES)
def test_a_plan_is_within_the_tolerance_and_faster_than_others(
    name: str, guidance: jf.Guidance | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(MACHINES[name])
    flow = machine.carry(small(), monkeypatch).guided(guidance)
    plan = jf.plan(flow, replace(tuned(), guidance=guidance), 4, 2e-3)
    made = plan.prediction
    assert made is not None
    assert (plan.tolerance, plan.fingerprint) == (2e-3, fingerprint(small()))
    assert (made.device, made.batch_size, made.guidance) == ("cpu with 1 threads", 4, guidance)

    def seconds(strategy: Any) -> tuple[float, jf.Samples]:
        began = machine.now
        drawn = draw(flow, strategy, LATENTS)
        return machine.now - began, drawn

    (taken, planned), (loop, exact) = seconds(plan), seconds("sequential")
    assert planned.certificate is not None
    assert planned.certificate.max() <= 2e-3
    assert (planned.images - exact.images).abs().max() <= 4e-3
    assert made.sequential_seconds == pytest.approx(loop)
    assert is_loop(*plan.solvers) == (name == "dear tokens")
    if name != "dear tokens":
        assert taken < loop
        assert made.seconds == pytest.approx(taken, rel=0.5)  # other latents take other numbers of sweeps
        assert taken <= 1.1 * min(seconds(replace(jf.Strategy.uniform(jf.Solver(p), 2), tolerance=2e-3))[0] for p in (
            jf.Whole(), jf.Window(4), jf.Window(8)))  # fmt: skip
    assert (3 in {solver.bf16_sweeps for solver in plan.solvers}) == (name == "bfloat16")
    assert {s.bf16_sweeps for s in jf.plan(flow, batch_size=4, bf16=False).solvers} == {0}


def test_a_block_that_the_exact_loop_solves_sooner_keeps_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower, left in (({0: 9.0}, [True, False]), ({0: 9.0, 1: 9.0}, [True, True])):
        flow = Machine(1.0, slower=slower).carry(small(), monkeypatch)
        plan = jf.plan(flow, tuned(), 2)
        assert [is_loop(solver) for solver in plan.solvers] == left
        assert plan.prediction is not None
        assert (plan.prediction.seconds == plan.prediction.sequential_seconds) == all(left)
        assert (plan.prediction.error == 0) == all(left)


def test_a_loop_within_five_evaluations_is_the_plan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens one by one are 16 calls and as many tokens as an evaluation, which is one call."""
    for call, at_once in ((64 / 11 - 0.05, True), (64 / 11 + 0.05, False)):
        machine = Machine(call, 1.0, low=1.0)
        flow = machine.carry(small(), monkeypatch)
        plan, seconds = jf.plan(flow, batch_size=1), machine.seconds(1, *[1] * TOKENS)
        assert (machine.now <= 4 * seconds) == at_once
        assert not at_once or is_loop(*plan.solvers)


def test_a_plan_whose_images_are_off_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose output is scaled makes errors of the blocks before larger."""
    flow = copy.deepcopy(small())
    flow.blocks[0].proj_out.bias.data[:4] += 0.7  # twice as large an image
    flow = Machine(1.0, slower={0: 0.2, 1: 0.2}).carry(flow, monkeypatch)
    plan = jf.plan(flow, batch_size=4, tolerance=3e-3)
    assert plan.prediction is not None
    assert 3e-4 < plan.prediction.error <= 3e-3
    assert not is_loop(*plan.solvers)
    assert all(3e-4 < solver.stopping.atol < 3e-3 for solver in plan.solvers)
    exact = draw(flow, "sequential", LATENTS).images
    assert (draw(flow, plan, LATENTS).images - exact).abs().max() <= 1e-2


def test_candidates_are_of_the_flow_s_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: set[int] = set()
    candidates = classmethod(lambda cls, num_tokens: lengths.add(num_tokens) or (cls(8),))
    monkeypatch.setattr(jf.Window, "candidates", candidates)
    jf.plan(Machine(1.0).carry(small(), monkeypatch), batch_size=2)
    assert lengths == {TOKENS}


def test_a_sample_that_overflows_does_not_stop_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = copy.deepcopy(small())
    flow.blocks[0].proj_out.bias.data[:4] = 200.0
    assert is_loop(jf.plan(Machine(1.0).carry(flow, monkeypatch), batch_size=2).solvers[0])


def test_a_tolerance_below_the_network_s_rounding_is_raised_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network in bfloat16, and in float32 under autocast."""
    machine = Machine(1.0)
    flow, wide = machine.carry(copy.deepcopy(small()).bfloat16(), monkeypatch), machine.carry(small(), monkeypatch)
    z = draw_latents(4, TOKENS, 4, start=FIRST_CALIBRATION_LATENT)
    floor, exact = rounding_floor(flow), draw(flow, "sequential", z, certify="always")
    assert exact.certificate is not None
    assert float(exact.certificate.max()) <= floor < 0.2
    with pytest.warns(UserWarning, match=r"tolerance 1e-06 is below the rounding of this flow's network: planned for"):
        plan = jf.plan(flow, batch_size=4, tolerance=1e-6)
    assert plan.tolerance == pytest.approx(2 * floor)
    assert jf.plan(flow, batch_size=1, tolerance=2.1 * floor).tolerance == 2.1 * floor
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="below the rounding"):
        jf.plan(wide, batch_size=1, tolerance=1e-6)
    flow.blocks[0].proj_out.bias.data[:4] = 200.0  # whose exact inverse overflows: that tells no rounding
    assert rounding_floor(flow) < math.inf
