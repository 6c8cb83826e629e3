"""Timings of blocks by a clock that only solves move, and the choice of a solver among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

import jacobiflow as jf
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner import benchmark
from jacobiflow.planner.benchmark import BlockTimings, TimedSolve, race, time_block, time_solve
from tests.helpers.invented import TOKENS, Machine, small

pytestmark = pytest.mark.usefixtures("one_thread")

Z, CONTEXT = draw_latents(6, TOKENS, 4), jf.Context(torch.arange(6) % 3)
WHOLE, SHORT, LONG = (jf.Solver(partition) for partition in (jf.Whole(), jf.Window(4), jf.Window(8)))
TIMINGS = BlockTimings(10.0, 1.0)
OPTIONS = SolveOptions(1e-3)


# ------------------------------------------------------------------------------------------------------ timed races


def test_slower_solvers_are_abandoned_and_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact loop takes 10 seconds. A solver is abandoned after 1.1 times the best time before it."""
    limits = list[float]()

    def time_solve(problem: Problem, solver: jf.Solver, options: SolveOptions, limit: float) -> TimedSolve:
        limits.append(limit)
        if seconds[solver] > limit:
            raise TimeoutError
        return TimedSolve(solver, seconds[solver], Z)

    monkeypatch.setattr(benchmark, "time_solve", time_solve)
    problem = Problem(small().blocks[0], Z, CONTEXT)
    for times, winner, bounds in (
        ((5.0, 4.0, 4.2), SHORT, (11.0, 5.5, 4.4)),
        ((99.0, 12.0, 9.0), LONG, (11.0, 11.0, 11.0)),
        ((10.5, 10.0, 99.0), None, (11.0, 11.0, 11.0)),
    ):
        seconds = dict(zip((WHOLE, SHORT, LONG), times, strict=True))
        limits.clear()
        best = race(problem, seconds, 10.0, OPTIONS)
        assert (None if best is None else best.solver) == winner
        assert limits == pytest.approx(bounds)


def test_a_short_solve_is_repeated_and_a_long_one_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    for call, repeats in ((1e-4, 7), (1.0, 1)):
        machine = Machine(call)
        problem = Problem(machine.carry(small(), monkeypatch).blocks[1], Z, CONTEXT)
        timed = time_solve(problem, WHOLE, OPTIONS, 1e9)
        assert machine.now == pytest.approx(repeats * timed.seconds)
        with pytest.raises(TimeoutError):
            time_solve(problem, WHOLE, OPTIONS, 0.9 * timed.seconds - call)


# ---------------------------------------------------------------------------------------------------- timed blocks


def test_the_exact_loop_and_an_evaluation_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long call once, a short one six times or until half a second is over; bfloat16 on four samples."""
    machine = Machine(1.0, 0.01, low=0.25)
    block = machine.carry(small(), monkeypatch).blocks[1]
    timings = time_block(Problem(block, Z, CONTEXT))
    sequential, evaluation, sweep = (
        machine.seconds(6, *[1] * TOKENS), machine.seconds(6, TOKENS), machine.seconds(4, TOKENS)
    )  # fmt: skip
    assert machine.now == pytest.approx(sequential + evaluation + (1 + 0.25) * sweep, rel=0.002)
    assert timings == pytest.approx((sequential, evaluation, 0.25 * evaluation), rel=0.05)
    for call, number in ((0.01, 4), (0.001, 6)):
        machine = Machine(call, low=0.25)
        block = machine.carry(small(), monkeypatch).blocks[1]
        timings = time_block(Problem(block, Z, CONTEXT), try_bf16=False)
        assert machine.now == pytest.approx(number * timings.sequential + 6 * timings.evaluation)
        assert timings.bf16_evaluation == math.inf


@pytest.mark.parametrize(("timings", "least"), [((0.1,), 0.5), ((1.0, 0.25), 0.75 + 2.0)])
def test_other_solvers_take_four_evaluations_or_three_in_bfloat16_and_a_certificate(
    timings: tuple[float, ...], least: float
) -> None:
    assert BlockTimings(least + 0.01, *timings).can_iterate
    assert not BlockTimings(least - 0.01, *timings).can_iterate


def test_bfloat16_is_tried_if_it_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it takes less than 0.8 of the time, and the exact loop more than three evaluations."""
    few = 32 / 13  # seconds of a call for which 16 tokens one by one take three times as long as at once
    for call, low, pays in ((9.0, 0.7, True), (9.0, 0.9, False), (few - 0.01, 0.1, False), (few + 0.01, 0.1, True)):
        block = Machine(call, 0.25, low=low).carry(small(), monkeypatch).blocks[1]
        assert math.isfinite(time_block(Problem(block, Z[:4], CONTEXT[:4])).bf16_evaluation) == pays


@jf.register_piece("quarters")
@dataclass(frozen=True)
class Quarters(jf.Partition):
    """A partition of a reader's own, with candidates."""

    def stop(self, front: int, num_tokens: int) -> int:
        return next(stop for k in range(1, 5) if (stop := k * num_tokens // 4) > front)

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[jf.Partition, ...]:
        return (cls(),) if num_tokens >= 4 else ()


def test_candidates_are_of_every_partition() -> None:
    plain = benchmark.candidates(196, TIMINGS)
    assert {each.partition for each in plain} == {jf.Whole(), jf.Window(32), jf.Window(64), Quarters()}
    both = benchmark.candidates(196, TIMINGS._replace(bf16_evaluation=0.5))
    assert both == plain + [replace(each, guess=jf.Bf16Sweeps(3)) for each in plain]


def test_a_winner_has_its_certified_answer_and_its_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01)
    problem = Problem(machine.carry(small(), monkeypatch).blocks[1], Z[:4], CONTEXT[:4])
    winner = race(problem, [WHOLE, SHORT], time_block(problem).sequential, OPTIONS)
    assert winner is not None
    started = machine.now
    solution = jf.solve(problem.block, problem.z, winner.solver, problem.context, tolerance=1e-3)
    assert winner.seconds == pytest.approx(machine.now - started)
    assert solution.residual.max() <= 1e-3
    assert torch.equal(solution.x, winner.x)
