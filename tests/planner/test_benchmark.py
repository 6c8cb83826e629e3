"""Timings of blocks by a clock that only solves move, and the choice of a solver from a table."""

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
from jacobiflow.planner.benchmark import BlockTimings, RaceState, TimedSolve, race, solver_key, time_block
from tests.helpers.invented import TOKENS, Machine, fitted_block, small

pytestmark = pytest.mark.usefixtures("one_thread")

Z, CONTEXT = draw_latents(6, TOKENS, 4), jf.Context(torch.arange(6) % 3)
WHOLE, SHORT, LONG = (jf.Solver(partition) for partition in (jf.Whole(), jf.Window(4), jf.Window(8)))
BF16 = replace(WHOLE, bf16_sweeps=3)
EIGHT = jf.Solver(stopping=jf.MaxSweeps(8))  # what `WHOLE` leads to if its slowest sample takes 9 sweeps
TIMINGS, START, LATE = BlockTimings(10.0, 1.0, 0.0), RaceState(1e9), -1.0


def row(solver: jf.Solver, *seconds: float, sweeps: int = 9) -> TimedSolve:
    return TimedSolve(solver, seconds, Z, sweeps)


# ------------------------------------------------------------------------------------------------------ timed races


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> dict[jf.Solver, list[float]]:
    """Seconds that solvers take, in turn; others take 99."""
    seconds: dict[jf.Solver, list[float]] = {}

    def time_solve(problem: Problem, solver: jf.Solver, options: SolveOptions) -> TimedSolve:
        taken = seconds[solver].pop(0) if seconds.get(solver) else 99.0
        if options.time_limit is not None and taken > options.time_limit:
            raise TimeoutError
        return row(solver, taken)

    monkeypatch.setattr(benchmark, "time_solve", time_solve)
    return seconds


def run_race(
    solvers: list[jf.Solver], batch_size: int = 2, state: RaceState = START
) -> tuple[TimedSolve | None, RaceState]:
    """A race of two samples."""
    problem = Problem(small().blocks[0], Z[:2], CONTEXT[:2])
    return race(problem, solvers, TIMINGS, SolveOptions(1e-3, batch_size=batch_size), state)


def test_slower_solvers_are_abandoned_and_the_leader_runs_first(solves: dict[jf.Solver, list[float]]) -> None:
    solves |= {WHOLE: [5.0], SHORT: [5.6], LONG: [4.0]}
    winner, state = run_race([WHOLE, SHORT, LONG])
    assert winner is not None
    assert (winner.solver, winner.timings, list(state.last)) == (LONG, (4.0,), [solver_key(LONG)])
    solves |= {LONG: [4.0], WHOLE: [3.0], SHORT: [3.0]}
    winner, _ = run_race([WHOLE, SHORT, LONG], state=state)
    assert winner is not None
    assert winner.solver == LONG and solves[WHOLE] == solves[SHORT] == [3.0]
    assert run_race([SHORT], state=RaceState(LATE)) == (None, RaceState(LATE))


@pytest.mark.parametrize(
    ("short", "long", "timings"),
    [([4.0, 4.1], [4.3, 3.9], (4.3, 3.9)), ([4.0, 1.0], [4.5], (4.0,)), ([9.5, 9.8], [12.0], (9.5, 9.8)),
     ([0.04, 0.06, 0.066], [0.042, 0.03, 0.036], (0.042, 0.03, 0.036)), ([10.5, 9.8], [12.0], (10.5, 9.8))],
)  # fmt: skip
def test_those_near_the_best_are_timed_again(
    short: list[float], long: list[float], timings: tuple[float, ...], solves: dict[jf.Solver, list[float]]
) -> None:
    """Once, or twice if they are short; also those near the exact loop, which takes 10 seconds."""
    solves |= {SHORT: short, LONG: long}
    winner, _ = run_race([SHORT, LONG])
    assert winner is not None
    assert winner.timings == timings


def test_the_exact_loop_takes_its_time_for_every_batch(solves: dict[jf.Solver, list[float]]) -> None:
    for batch_size, seconds, wins in ((2, 9.0, True), (2, 10.0, False), (1, 19.0, True), (1, 20.0, False)):
        solves[SHORT] = [seconds] * 2
        assert (run_race([SHORT], batch_size)[0] is not None) == wins


def test_a_fixed_number_of_sweeps_wins_and_leads_the_next_race(solves: dict[jf.Solver, list[float]]) -> None:
    solves |= {SHORT: [9.0], WHOLE: [5.0], EIGHT: [4.0]}
    winner, state = run_race([SHORT, WHOLE])
    assert winner is not None
    assert (winner.solver, list(state.last)) == (EIGHT, [solver_key(WHOLE)])


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
    assert timings == pytest.approx((sequential, evaluation, 0.0, 0.25 * evaluation), rel=0.05)
    for call, number in ((0.01, 4), (0.001, 6)):
        machine = Machine(call, low=0.25)
        block = machine.carry(small(), monkeypatch).blocks[1]
        timings = time_block(Problem(block, Z, CONTEXT), try_bf16=False)
        assert machine.now == pytest.approx(number * timings.sequential + 6 * timings.evaluation)
        assert timings.bf16_evaluation == math.inf


@pytest.mark.parametrize(("timings", "least"), [((0.1, 0.0), 0.5), ((1.0, 0.0, 0.25), 0.75 + 2.0)])
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


def test_candidates_are_of_every_partition_with_the_fitted_pieces() -> None:
    fitted = fitted_block()
    plain = benchmark.candidates(196, 1e-4, None, TIMINGS)
    assert {solver.partition for solver in plain} == {jf.Whole(), jf.Window(32), jf.Window(64), Quarters()}
    assert {(solver.guess, solver.correction) for solver in plain} == {(jf.Latent(), jf.Plain())}
    assert {solver.stopping for solver in plain} == {jf.Tolerance(1e-4)}
    both = benchmark.candidates(196, 1e-4, fitted, TIMINGS._replace(bf16_evaluation=0.5))
    assert len(both) == 2 * len(plain)
    assert {solver.bf16_sweeps for solver in both} == {0, 3}
    assert {(solver.guess, solver.correction) for solver in both} == {(fitted.guess, fitted.correction)}


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_winner_has_its_certified_answer_and_its_real_time(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01)
    problem = Problem(machine.carry(small(), monkeypatch).blocks[1], Z[:4], CONTEXT[:4])
    timings, options = time_block(problem[:batch_size]), SolveOptions(1e-3, batch_size=batch_size)
    started = machine.now
    winner, state = race(problem, [WHOLE, SHORT], timings, options, START)
    assert winner is not None
    assert state.seconds_left == pytest.approx(1e9 - (machine.now - started))
    started = machine.now
    solution = jf.solve(problem.block, problem.z, winner.solver, problem.context, batch_size=batch_size, tolerance=1e-3)
    assert winner.seconds == pytest.approx(machine.now - started)
    assert solution.residual.max() <= 1e-3
    assert torch.equal(solution.x, winner.x)
