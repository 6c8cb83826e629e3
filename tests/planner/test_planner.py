"""Plans on a machine whose every second is known: what is planned, and what comes of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.planner import planner
from jacobiflow.planner.benchmark import TimedSolve
from tests.helpers.invented import GUIDANCE, TOKENS, Machine, draw, small

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
    plan = jf.plan(flow, 4, 2e-3)
    prediction = plan.prediction
    assert prediction is not None
    assert (plan.tolerance, plan.fingerprint) == (2e-3, fingerprint(small()))
    assert (prediction.device, prediction.batch_size, prediction.guidance) == ("cpu with 1 thread", 4, guidance)

    def timed_draw(strategy: Any) -> tuple[float, jf.Samples]:
        started = machine.now
        samples = draw(flow, strategy, LATENTS)
        return machine.now - started, samples

    (seconds, samples), (loop_seconds, exact) = timed_draw(plan), timed_draw("sequential")
    assert samples.residual is not None
    assert samples.residual.max() <= 2e-3
    assert (samples.images - exact.images).abs().max() <= 4e-3
    assert prediction.sequential_seconds == pytest.approx(loop_seconds)
    assert is_loop(*plan.solvers) == (name == "dear tokens")
    if name != "dear tokens":
        assert seconds < loop_seconds
        assert prediction.seconds == pytest.approx(seconds, rel=0.5)  # other latents take other numbers of sweeps
        others = [jf.Strategy.uniform(jf.Solver(p), 2) for p in (jf.Whole(), jf.Window(4), jf.Window(8))]
        assert seconds <= 1.1 * min(timed_draw(replace(other, tolerance=2e-3))[0] for other in others)
    assert any(isinstance(solver.guess, jf.Bf16Sweeps) for solver in plan.solvers) == (name == "bfloat16")
    assert {solver.guess for solver in jf.plan(flow, batch_size=4, bf16=False).solvers} == {jf.Latent()}


def test_a_flow_of_one_token_has_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the exact loop is timed as slow, so that sweeps are tried."""
    seconds = chain([10.0], repeat(1.0))
    monkeypatch.setattr("jacobiflow.planner.benchmark._time_repeatedly", lambda run, *_: (run(), [next(seconds)])[1])
    flow = jf.TarFlow(jf.TokenConfig(1, 2, width=8, num_blocks=2, layers_per_block=1, head_dim=4))
    assert jf.plan(flow, batch_size=3).check(flow) is None
    assert jf.sample(flow, 3, strategy="auto").outcome.has_shortfall is False


def test_blocks_of_different_sizes_are_timed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps win in one of two blocks, whichever is solved first."""
    for slower, left in (({0: 9.0}, [True, False]), ({1: 9.0}, [False, True])):
        flow = jf.TarFlow(jf.TokenConfig(TOKENS, 4, width=(64, 128), num_blocks=2, layers_per_block=1))
        flow = Machine(1.0, slower=slower).carry(flow.requires_grad_(False), monkeypatch)
        plan = jf.plan(flow, batch_size=2)
        assert [is_loop(solver) for solver in plan.solvers] == left
        assert plan.prediction is not None
        assert plan.prediction.sequential_seconds == 2 * TOKENS


def test_a_plan_whose_images_are_off_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose output is scaled makes errors of the blocks before larger."""
    flow = copy.deepcopy(small())
    flow.blocks[0].proj_out.bias.data[:4] += 0.7  # twice as large an image
    flow = Machine(1.0, slower={0: 0.2, 1: 0.2}).carry(flow, monkeypatch)
    plan = jf.plan(flow, batch_size=4, tolerance=3e-3)
    assert plan.prediction is not None
    assert 1e-4 < plan.prediction.error <= 3e-3
    assert not is_loop(*plan.solvers)
    assert all(0.01 < solver.tolerance_factor < 1 for solver in plan.solvers)
    exact = draw(flow, "sequential", LATENTS).images
    assert (draw(flow, plan, LATENTS).images - exact).abs().max() <= 1e-2


def fix_winners(monkeypatch: pytest.MonkeyPatch, *winners: tuple[jf.Solver, float]) -> None:
    """Makes the winner of the race in each block, in order of sampling, and its seconds known."""
    rest = iter(winners)

    def race(problem: Problem, *_: Any) -> TimedSolve:
        return TimedSolve(*next(rest), exact_x(problem))

    monkeypatch.setattr(planner, "race", race)


def exact_x(problem: Problem) -> torch.Tensor:
    return jf.solve(problem.block, problem.z, jf.Solver(jf.Sequential()), problem.context).x


def test_a_plan_that_is_no_faster_when_verified_is_the_exact_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take 0.97 of its time, at the second try at least; a large batch is not timed again."""
    machine = Machine(1.0)
    flow = machine.carry(small(), monkeypatch)
    loop = 2 * machine.seconds(1, *[1] * TOKENS)
    cases = ((4, [0.9], 0.9), (4, [1.5, 0.96], 0.96), (4, [1.5, 0.98], None), (6, [1.5], 0.25))
    for batch_size, shares, share in cases:
        rest = iter(shares)
        fix_winners(monkeypatch, *[(jf.Solver(tolerance_factor=0.1), loop / 8)] * 2)
        monkeypatch.setattr(planner, "time_call", lambda run, device, rest=rest: (next(rest) * loop, run()))
        plan = jf.plan(flow, batch_size=batch_size, tolerance=1e-2)
        assert is_loop(*plan.solvers) == (share is None)
        assert plan.prediction is not None
        assert plan.prediction.seconds == pytest.approx((share or 1.0) * loop)


def test_a_plan_is_verified_on_latents_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to four samples, after those of the races, which take two at least."""
    ranges = list[range]()

    def note_range(num: int, *sizes: int, start: int) -> torch.Tensor:
        ranges.append(range(start - FIRST_CALIBRATION_LATENT, start - FIRST_CALIBRATION_LATENT + num))
        return draw_latents(num, *sizes, start=start)

    monkeypatch.setattr(planner, "draw_latents", note_range)
    for batch_size, raced, verified in ((1, 2, 1), (16, 16, 4)):
        ranges.clear()
        fix_winners(monkeypatch, *[(jf.Solver(), 1.0)] * 2)
        jf.plan(Machine(1.0).carry(small(), monkeypatch), batch_size=batch_size)
        timing, race, verification = ranges
        assert (len(timing), len(race), len(verification)) == (batch_size, raced, verified)
        assert timing.start == race.start < race.stop <= verification.start


def test_a_sample_that_overflows_does_not_stop_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = copy.deepcopy(small())
    flow.blocks[0].proj_out.bias.data[:4] = 200.0
    assert is_loop(jf.plan(Machine(1.0).carry(flow, monkeypatch), batch_size=2).solvers[0])


def test_a_tolerance_below_the_network_s_rounding_is_raised_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network in bfloat16, and in float32 under autocast."""
    machine = Machine(1.0)
    flow, wide = machine.carry(copy.deepcopy(small()).bfloat16(), monkeypatch), machine.carry(small(), monkeypatch)
    z = draw_latents(4, TOKENS, 4, start=FIRST_CALIBRATION_LATENT)
    floor, exact = planner.rounding_floor(flow), draw(flow, "sequential", z, certify="always")
    assert exact.residual is not None
    assert float(exact.residual.max()) <= floor < 0.2
    if floor == 0:
        pytest.skip("this processor computes a token in bfloat16 alike in every pass")
    with pytest.warns(
        UserWarning, match=r"tolerance 1e-06 is below the rounding of this flow's network: planned for"
    ) as caught:
        plan = jf.plan(flow, batch_size=4, tolerance=1e-6)
    assert plan.tolerance == pytest.approx(2 * floor)
    assert caught[0].filename == __file__
    assert jf.plan(wide, batch_size=1, tolerance=1e-9).tolerance == 1e-9
    assert jf.plan(flow, batch_size=1, tolerance=2.1 * floor).tolerance == 2.1 * floor
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="below the rounding"):
        jf.plan(wide, batch_size=1, tolerance=1e-6)
    flow.blocks[0].proj_out.bias.data[:4] = 200.0  # whose exact inverse overflows: that tells no rounding
    assert planner.rounding_floor(flow) < math.inf
