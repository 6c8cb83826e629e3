"""Plans on a machine whose every second is known: what is chosen, what is tried, and what comes of it."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from invented import GUIDANCE, TOKENS, Machine, claiming, draw, make_report, run, small, tuned

import jacobiflow as jf
from jacobiflow.calibration.tuning import BlockTuning, CountedRun
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.guidance import guided
from jacobiflow.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.strategy import PlanSettings
from jacobiflow.strategy.costs import exact_costs, measure
from jacobiflow.strategy.options import Option, block_options, combined
from jacobiflow.strategy.plan import loop_plan, rounding_floor, trial

pytestmark = pytest.mark.usefixtures("one_thread")

# Four of those that a plan is tried on: the first that a tuning of four samples has not seen.
TRIED = draw_latents(4, TOKENS, 4, 0, FIRST_CALIBRATION_LATENT + 4)
MACHINES = {"dear calls": Machine(1.0, 0.01), "bfloat16": Machine(1.0, 0.01, 0.01), "dear tokens": Machine(0.1, 0.1)}


def is_loop(*solvers: jf.Solver) -> bool:
    return all(solver.partition == jf.Sequential() for solver in solvers)


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
@pytest.mark.parametrize("name", MACHINES)
def test_a_plan_is_the_cheapest_within_the_tolerance_and_takes_what_it_predicts(
    name: str, guidance: jf.Guidance | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, tuning = replace(MACHINES[name]), replace(tuned(), guidance=guidance)
    flow, twice = machine.carry(small(), monkeypatch), 1 if guidance is None else 2
    found = jf.plan(flow, tuning, 4, 2e-3, guidance=guidance)
    made, planning = found.prediction, machine.now
    assert made is not None
    assert (found.tolerance, found.fingerprint) == (2e-3, fingerprint(small()))
    assert (made.device, made.batch_size, made.guidance) == ("cpu with 1 threads", 4, guidance)
    exact, started = draw(flow, "sequential", TRIED, guidance=guidance, certify=False), machine.now
    drawn = draw(flow, found, TRIED, guidance=guidance, certify=False)
    certificates = sum(not is_loop(solver) for solver in found.solvers) * machine.seconds(
        len(drawn.images) * twice, TOKENS
    )
    assert made.seconds == pytest.approx(machine.now - started + certificates)
    assert made.sequential_seconds == pytest.approx(2 * machine.seconds(4 * twice, *[1] * TOKENS))
    assert (drawn.images - exact.images).abs().max() <= 2e-3
    assert is_loop(*found.solvers) == (name == "dear tokens")
    # At what this machine takes, the enumeration's best of those whose trial is within the tolerance.
    block, started = guided(flow.blocks[0], guidance), machine.now
    exact_seconds = exact_costs(block, 4, flow)
    if name == "dear tokens":  # where the loop takes less than two passes, nothing else is measured
        assert planning == pytest.approx(machine.now - started)
    costs = measure(block, tuning, 4, flow, exact_seconds)
    alone = Option(jf.Solver(jf.Sequential()), costs.sequential, 0.0)
    options = [[alone, *block_options(block, costs, 4, 2e-3, PlanSettings())] for block in tuning.blocks]
    ways = sorted(itertools.product(*options), key=lambda way: sum(one.seconds for one in way))
    choices = (next(w for w in ways if combined([one.error for one in w]) <= 2e-3 * 0.7**k) for k in range(4))
    best = next(choice for choice in choices if trial(flow, choice, TRIED, guidance).error <= 2e-3)
    assert found.solvers == tuple(option.solver for option in best)
    assert made.error == pytest.approx(combined([option.error for option in best]))


def test_under_other_guidance_only_what_stops_on_a_tolerance_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Machine(1.0).carry(small(), monkeypatch)
    tuning = claiming(run(jf.Whole(), 1e-4, 9, 1e-5), counted=(CountedRun(0, 8, 1e-5, 1e-5),))
    for guidance, sweeps in ((None, {8}), (GUIDANCE, {None})):
        found = jf.plan(flow, replace(tuning, guidance=jf.Guidance(0.0)), 2, 1e-2, guidance=guidance)
        assert {solver.stopping.max_sweeps for solver in found.solvers} == sweeps


def test_a_plan_whose_images_are_off_is_made_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both errors are far larger than claimed; the third choice, for a half of the tolerance, is good."""
    flow = Machine(1.0).carry(small(), monkeypatch)
    tuning = claiming(
        run(jf.Whole(), 1.0, 1, 0.8e-3), run(jf.Window(TOKENS), 0.5, 2, 0.55e-3), run(jf.Segments(1), 1e-5, 4, 0.3e-3)
    )
    found = jf.plan(flow, tuning, 2, 1e-3)
    assert found.prediction is not None
    assert found.prediction.error == pytest.approx(0.3e-3 * 2**0.25)
    for settings in (PlanSettings(trials=2), PlanSettings(stricter=0.95), PlanSettings(trials=2, stricter=0.4)):
        partitions = {solver.partition for solver in jf.plan(flow, tuning, 2, 1e-3, settings=settings).solvers}
        assert partitions == {jf.Segments(1) if settings.stricter == 0.4 else jf.Sequential()}


def test_what_gains_less_than_the_margin_is_left_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, tuning = Machine(1.0).carry(small(), monkeypatch), claiming(run(jf.Whole(), 1e-5, 9, 1e-5))
    made = jf.plan(flow, tuning, settings=PlanSettings(margin=0.0)).prediction
    assert made is not None
    gain = 1 - made.seconds / made.sequential_seconds
    for margin, gains in ((gain - 0.005, True), (gain + 0.005, False)):
        assert is_loop(*jf.plan(flow, tuning, settings=PlanSettings(margin=margin)).solvers) != gains


def test_a_loop_within_two_passes_is_the_plan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens one by one: 16 calls and as many tokens as a pass, which is one call."""
    for call, at_once in ((16 / 14 - 0.01, True), (16 / 14 + 0.01, False)):
        flow = Machine(call, 1.0).carry(small(), monkeypatch)
        assert (loop_plan(flow, 1, 1e-3, None) is not None) == at_once


def test_a_block_that_the_loop_solves_sooner_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sweeps take is measured on block 0; block 1 takes longer, as its trial shows."""
    for slower, left in (({1: 9.0}, [False, True]), ({0: 9.0}, [True, True])):
        flow = Machine(1.0, slower=slower).carry(small(), monkeypatch)
        found = jf.plan(flow, claiming(run(jf.Whole(), 1e-5, 9, 1e-5)), 2)
        assert [is_loop(solver) for solver in found.solvers] == left
        made = found.prediction
        assert made is not None
        assert made.sequential_seconds == 2 * TOKENS
        assert (made.seconds == 2 * TOKENS) == all(left)
        assert made.error == (0 if all(left) else 1e-5)


# --------------------------------------------------------------------------------------------------- trial and rounding


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
def test_a_trial_measures_what_samples_take_and_miss(guidance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Machine(1.0, 0.1).carry(small(), monkeypatch)
    solvers = (jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-2)), jf.Solver(jf.Window(4), stopping=jf.MaxSweeps(2)))
    tried = trial(flow, [Option(solver, 0.0, 0.0) for solver in solvers], TRIED, guidance)
    drawn, exact = (
        draw(flow, strategy, TRIED, guidance=guidance, certify=False)
        for strategy in (jf.Strategy(solvers), "sequential")
    )
    assert tried.error == pytest.approx(float((drawn.images - exact.images).abs().max()), rel=1e-4)
    assert tried.seconds == pytest.approx([block.seconds for block in drawn.stats])
    assert tried.sequential == pytest.approx([block.seconds for block in exact.stats])


def test_a_sample_that_only_the_options_lose_makes_them_wrong() -> None:
    overflow = jf.MeanAffine(torch.full((TOKENS, 4), 200.0), torch.zeros(TOKENS, 4))
    good = Option(jf.Solver(stopping=jf.MaxSweeps(TOKENS)), 0.0, 0.0)
    bad = Option(jf.Solver(guess=overflow, stopping=jf.MaxSweeps(1)), 0.0, 0.0)
    assert trial(small(), [good, good], TRIED, None).error < 1e-5
    assert trial(small(), [bad, good], TRIED, None).error == math.inf
    assert 0.1 < trial(small(), [good, bad], TRIED, None).error < math.inf  # it goes on as zeros
    flow = copy.deepcopy(small())
    flow.blocks[0].proj_out.bias.data[:4] = 200.0
    assert trial(flow, [good, good], TRIED, None).error < 1e-5  # what the loop loses too does not count


def test_a_tolerance_below_the_network_s_rounding_is_raised_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the flow of digits in bfloat16, and in float32 under autocast."""
    machine = Machine(1.0)
    flow, digits = (machine.carry(jf.load("digits-p1", dtype=dtype), monkeypatch) for dtype in ("bfloat16", None))
    z = draw_latents(4, 64, 1, 0, FIRST_CALIBRATION_LATENT + 4)
    plain = BlockTuning(jf.Latent(), jf.Plain(), (run(jf.Whole(), 1e-2, 5, 1e-2),), (), 1.0)
    tuning, low = (
        replace(tuned(), fingerprint=fingerprint(each), num_tokens=64, blocks=(plain,) * 4) for each in (digits, flow)
    )
    floor, exact = rounding_floor(flow, z, None), draw(flow, "sequential", z, certify="always")
    assert exact.certificate is not None
    assert float(exact.certificate.max()) <= floor < 0.2
    with pytest.warns(UserWarning, match=r"tolerance 0\.001 is below the rounding of this flow's network: planned for"):
        found = jf.plan(flow, low, 4)
    assert found.tolerance == pytest.approx(2 * floor)
    drawn = draw(flow, found, z)
    assert drawn.certificate is not None
    assert (drawn.certificate <= found.tolerance).all()
    assert jf.plan(flow, low, 1, 2.1 * floor).tolerance == 2.1 * floor
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="below the rounding"):
        jf.plan(digits, tuning, 1, 1e-4, settings=PlanSettings(trials=0))
    flow.blocks[0].proj_out.bias.data[:1] = 200.0  # whose exact inverse overflows: that tells no rounding
    assert rounding_floor(flow, z, None) < math.inf


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tolerance": 0}, "tolerance=0: give a positive number; at 0 use strategy 'sequential'"),
    ({"device": "cuda:0"}, "device='cuda:0': the flow is on cpu"),
    ({"flow": small(1)}, r"the tuning is of another flow.*calibrate this one"),
    ({"report": make_report([1, 1])}, "this report has no tuning: calibrate with chord=True"),
]  # fmt: skip


@pytest.mark.parametrize(("named", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jf.plan(**{"flow": small(), "report": tuned(), **named})


def test_a_tuning_of_other_blocks_or_tokens_is_refused() -> None:
    for tuning in (replace(tuned(), num_tokens=9), replace(tuned(), blocks=tuned().blocks[:1])):
        with pytest.raises(ValueError, match=r"tuning of [12] blocks of (9|16) tokens, but the flow has 2 of 16"):
            jf.plan(small(), tuning)
    wrong = replace(tuned().blocks[1], guess=jf.MeanAffine(torch.zeros(16, 3), torch.zeros(16, 3)))
    with pytest.raises(ValueError, match=r"tuning, block 1: MeanAffine of shape \(16, 3\), but.* \(16, 4\)"):
        jf.plan(small(), replace(tuned(), blocks=(tuned().blocks[0], wrong)))
