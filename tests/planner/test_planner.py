"""Plans on a machine whose every second is known: what is planned, and what comes of it."""

from __future__ import annotations

import copy
import importlib
import math
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.planner import BlockTuning
from jacobiflow.planner.benchmark import Race, Runner
from jacobiflow.planner.fit import SAMPLES
from tests.helpers.invented import GUIDANCE, TOKENS, Halfway, Machine, draw, make_tuning, small, tuned

PLAN: Any = importlib.import_module("jacobiflow.planner.planner")  # whose name in the package is the function's
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
    assert planned.residual is not None
    assert planned.residual.max() <= 2e-3
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


def test_a_flow_of_one_token_has_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the exact loop is timed as slow, so that sweeps are tried."""
    seconds = chain([10.0], repeat(1.0))
    monkeypatch.setattr("jacobiflow.planner.benchmark._timings", lambda run, *_: (run(), [next(seconds)])[1])
    flow = jf.TarFlow(jf.TokenConfig(1, 2, channels=8, num_blocks=2, layers_per_block=1, head_dim=4))
    assert jf.plan(flow, batch_size=3).check(flow) is None
    assert jf.sample(flow, 3, strategy="auto").outcome.has_shortfall is False


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


def test_blocks_of_different_sizes_are_timed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps win in one of two blocks, whichever is solved first."""
    for slower, left in (({0: 9.0}, [True, False]), ({1: 9.0}, [False, True])):
        flow = jf.TarFlow(jf.TokenConfig(TOKENS, 4, channels=(64, 128), num_blocks=2, layers_per_block=1))
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
    assert 3e-4 < plan.prediction.error <= 3e-3
    assert not is_loop(*plan.solvers)
    assert all(3e-4 < solver.stopping.atol < 3e-3 for solver in plan.solvers)
    exact = draw(flow, "sequential", LATENTS).images
    assert (draw(flow, plan, LATENTS).images - exact).abs().max() <= 1e-2


class Winners:
    """Races whose winner in each block, in order of sampling, is known; `None` is the exact loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *winners: tuple[jf.Solver, float] | None) -> None:
        self.limits, self.winners = list[float](), winners
        monkeypatch.setattr(PLAN, "Race", self._race)
        monkeypatch.setattr(Race, "run", self._run)

    def _race(self, *arguments: Any) -> Race:
        self.limits.append(arguments[-1])
        self.rest = iter(self.winners)
        return Race(*arguments)

    def _run(self, block: Any, z: torch.Tensor, labels: Any, solvers: Any) -> Runner | None:
        winner, self.z = next(self.rest), z
        if winner is None:
            return None
        return Runner(winner[0], (winner[1],), jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x, 9, 0.0)


@pytest.mark.parametrize(
    ("stopping", "error", "tightened"),
    [
        (jf.Tolerance(2e-3), 4e-3, [jf.Tolerance(2e-3 / 8), jf.Tolerance(2e-3 / 64)]),
        (jf.MaxSweeps(2), 4e-3, [jf.MaxSweeps(3), jf.MaxSweeps(4)]),
        (jf.MaxSweeps(2), 4e-2, [jf.MaxSweeps(4), jf.MaxSweeps(6)]),
    ],
)
def test_sweeps_are_tightened_twice_to_half_of_the_error_allowed(
    stopping: Any, error: float, tightened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or by a sweep for each power of ten; then the exact loop is the plan."""
    flow, solver = Machine(1.0).carry(small(), monkeypatch), jf.Solver(stopping=stopping)
    Winners(monkeypatch, (solver, 1.0), (solver, 1.0))
    given, notes = list[Any](), list[tuple[int, int, str]]()

    def solve_certified(block: Any, z: torch.Tensor, solver: jf.Solver, labels: Any, **named: Any) -> Any:
        given.append(solver.stopping)
        exact = jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x
        return SimpleNamespace(x=exact + error * (block is flow.blocks[0]))

    monkeypatch.setattr(PLAN, "solve_certified", solve_certified)
    plan = jf.plan(flow, batch_size=6, progress=lambda *note: notes.append(note))
    assert is_loop(*plan.solvers)
    assert notes == [
        (1, 2, "timing solvers"),
        (2, 2, "timing solvers"),
        *[(1, 2, "verifying"), (2, 2, "verifying")] * 4,
    ]
    for want, found in zip([stopping, *tightened], given[::2], strict=True):
        assert found.max_sweeps == want.max_sweeps
        assert found.atol is want.atol is None or found.atol == pytest.approx(want.atol, rel=0.05)


def test_a_plan_that_is_no_faster_when_verified_is_the_exact_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take 0.97 of its time, at the second try at least; a large batch is not timed again."""
    machine = Machine(1.0)
    flow = machine.carry(small(), monkeypatch)
    loop = 2 * machine.seconds(1, *[1] * TOKENS)
    for batch_size, shares, taken in (
        (4, [0.9], 0.9),
        (4, [1.5, 0.96], 0.96),
        (4, [1.5, 0.98], None),
        (6, [1.5], 0.25),
    ):
        rest = iter(shares)
        Winners(monkeypatch, *[(jf.Solver(), loop / 8)] * 2)
        monkeypatch.setattr(PLAN, "time_call", lambda run, device, rest=rest: (next(rest) * loop, run()))
        plan = jf.plan(flow, batch_size=batch_size, tolerance=1e-2)
        assert is_loop(*plan.solvers) == (taken is None)
        assert plan.prediction is not None
        assert plan.prediction.seconds == pytest.approx((taken or 1.0) * loop)


def test_the_seconds_of_a_race_are_those_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples, where batches are of one; together they may take 0.97 of the exact loop's time."""
    machine = Machine(1.0)
    flow = machine.carry(small(), monkeypatch)
    loop, window = machine.seconds(1, *[1] * TOKENS), jf.Solver(jf.Window(4))
    latents = draw_latents(6, TOKENS, 4, start=FIRST_CALIBRATION_LATENT + SAMPLES)
    for batch_size, seconds, wins in ((6, 0.93 * loop, True), (6, 0.95 * loop, False), (1, 1.86 * loop, True)):
        winners = Winners(monkeypatch, None, (window, seconds))
        plan = jf.plan(flow, batch_size=batch_size, tolerance=1e-2)
        assert [is_loop(solver) for solver in plan.solvers] == [not wins, True]
        z = flow.blocks[1].permutation(flow.prior_tokens(latents[: len(winners.z)]))
        exact = jf.solve(flow.blocks[1], z, jf.Solver(jf.Sequential()), torch.arange(len(z)) % 3).x
        torch.testing.assert_close(winners.z, flow.blocks[1].permutation(exact))  # where the exact loop won
        assert plan.prediction is not None
        assert batch_size == 1 or plan.prediction.seconds == pytest.approx(loop + (seconds if wins else loop))


def test_races_take_two_seconds_or_half_of_the_exact_loop_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for call, limit in ((1.0, 16.0), (0.1, 2.0)):
        winners = Winners(monkeypatch, None, None)
        jf.plan(Machine(call).carry(small(), monkeypatch), batch_size=1)
        assert winners.limits == pytest.approx([limit])


def test_a_plan_is_verified_on_latents_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to four samples, after those of a tuning and of the races, which take two at least."""
    drawn = list[range]()

    def noted(num: int, *sizes: int, start: int) -> torch.Tensor:
        drawn.append(range(start - FIRST_CALIBRATION_LATENT, start - FIRST_CALIBRATION_LATENT + num))
        return draw_latents(num, *sizes, start=start)

    monkeypatch.setattr(PLAN, "draw_latents", noted)
    for batch_size, raced, verified in ((1, 2, 1), (16, 16, 4)):
        drawn.clear()
        Winners(monkeypatch, *[(jf.Solver(), 1.0)] * 2)
        jf.plan(Machine(1.0).carry(small(), monkeypatch), batch_size=batch_size)
        timing, race, verification = drawn
        assert (len(timing), len(race), len(verification)) == (batch_size, raced, verified)
        assert SAMPLES <= timing.start == race.start < race.stop <= verification.start


def test_a_plan_is_for_16_samples_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = jf.plan(Machine(0.01).carry(small(), monkeypatch))
    assert plan.prediction is not None
    assert (plan.prediction.batch_size, plan.tolerance) == (16, 1e-3)


def test_a_plan_has_the_pieces_of_the_tuning_in_the_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a reader's own too; if it is of the flow's weights."""
    pieces = BlockTuning(jf.Zeros(), Halfway(100))
    small().save_pretrained(tmp_path)
    make_tuning(pieces, pieces).save(tmp_path / "tuning.json")
    flow = Machine(1.0).carry(jf.load(tmp_path), monkeypatch)
    solvers = jf.plan(flow, batch_size=2).solvers
    assert {(solver.guess, solver.correction) for solver in solvers} == {(jf.Zeros(), Halfway(100))}
    with torch.no_grad():
        flow.blocks[0].proj_out.bias.add_(0.1)  # fine-tuned in place
    with pytest.warns(
        UserWarning, match="the tuning in the flow's folder is of other weights, and is not used"
    ) as caught:
        plan = jf.plan(flow, batch_size=2)
    assert caught[0].filename == __file__
    assert {solver.guess for solver in plan.solvers} == {jf.Latent()}
    (tmp_path / "tuning.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tuning .*tuning\.json"):
        jf.plan(flow)


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
    floor, exact = PLAN.rounding_floor(flow), draw(flow, "sequential", z, certify="always")
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
    assert PLAN.rounding_floor(flow) < math.inf


def test_the_worst_block_of_rounded_weights_is_solved_exactly_if_images_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow, solver = Machine(1.0).carry(small(), monkeypatch), jf.Solver(jf.Sequential(), int16_weights=True)
    Winners(monkeypatch, (solver, 1.0), (solver, 1.0))

    def solve_certified(block: Any, z: torch.Tensor, solver: jf.Solver, labels: Any, **named: Any) -> Any:
        residual = 1e-4 * (1 + (block is flow.blocks[1])) * solver.int16_weights
        exact = jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x
        return SimpleNamespace(x=exact + 6 * residual, residual=torch.tensor([residual]))

    monkeypatch.setattr(PLAN, "solve_certified", solve_certified)
    assert [solver.int16_weights for solver in jf.plan(flow, batch_size=6).solvers] == [True, False]
