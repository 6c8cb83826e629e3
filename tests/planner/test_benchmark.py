"""Races by a clock that only solves move: who runs, who is abandoned, and who wins."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import jacobiflow as jf
import jacobiflow.planner.benchmark as race_module
from jacobiflow.models.latents import draw_latents
from jacobiflow.planner.benchmark import Exact, Race, Runner, candidates, time_exact
from tests.helpers.invented import TOKENS, Machine, fitted_block, small

pytestmark = pytest.mark.usefixtures("one_thread")

Z = draw_latents(6, TOKENS, 4)
LABELS = torch.arange(6) % 3
WHOLE, SHORT, LONG = (jf.Solver(partition) for partition in (jf.Whole(), jf.Window(4), jf.Window(8)))
LOWERED = replace(WHOLE, bf16_sweeps=3)
ROUNDED = jf.Solver(jf.Sequential(), int16_weights=True)
NAMES = {WHOLE: "whole", SHORT: "short", LONG: "long", LOWERED: "lowered", ROUNDED: "rounded"}


def name_of(solver: jf.Solver) -> str:
    return NAMES.get(solver, f"{solver.bf16_sweeps} + {solver.stopping.max_sweeps} sweeps")


class Track:
    """Races of two samples against an exact loop of 10 seconds; solves take what `run` is given, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_size: int = 2, time_limit: float = 1e9) -> None:
        self.race = Race(Exact(10.0, 1.0, math.inf, 0.0), batch_size, 1e-3, time_limit)
        self.now, self.sweeps, self.residual = 100.0, (3, 9), 1e-4
        self.runs, self.seconds = list[str](), dict[str, list[float]]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(race_module, "solve_certified", self._solve)

    def _solve(
        self,
        block: str,
        z: Any,
        solver: jf.Solver,
        labels: Any,
        batch_size: int,
        tolerance: float,
        time_limit: float | None,
    ) -> Any:
        assert (block, batch_size, tolerance) == ("block", self.race.batch_size, 1e-3)
        self.runs.append(name_of(solver))
        seconds = self.seconds[name_of(solver)].pop(0)
        limit = math.inf if time_limit is None else time_limit
        self.now += min(seconds, limit)
        if seconds > limit:
            raise TimeoutError
        residual = torch.tensor([0.0, self.residual])
        return SimpleNamespace(x=z, sample_sweeps=torch.tensor(self.sweeps), residual=residual)

    def run(self, solvers: Sequence[jf.Solver], **seconds: float | list[float]) -> Runner | None:
        """The winner; `sweeps` are the seconds of the solver that makes a number of sweeps, 99 by default."""
        self.seconds = {name: taken if isinstance(taken, list) else [taken] * 3 for name, taken in seconds.items()}
        for name in ("0 + 1 sweeps", "0 + 8 sweeps", "3 + 5 sweeps"):
            self.seconds[name] = self.seconds.get("sweeps", [99.0]).copy()
        self.runs, self.began = [], self.now
        return self.race.run("block", Z[:2], LABELS[:2], solvers)  # type: ignore[arg-type]

    def spent(self) -> float:
        return self.now - self.began


def test_the_fastest_wins_and_slower_ones_are_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    track = Track(monkeypatch)
    winner = track.run([WHOLE, SHORT, LONG], whole=5.0, short=9.0, long=4.0)
    assert winner == Runner(LONG, (4.0,), winner.x, 9, winner.residual)
    assert torch.equal(winner.x, Z[:2])
    assert track.runs == ["whole", "short", "long", "0 + 8 sweeps"]
    assert track.spent() == pytest.approx(5 + 1.1 * 5 + 4 + 1.1 * 4)
    assert track.run([WHOLE], whole=11.5) is None
    assert track.spent() == pytest.approx(1.1 * 10)


def test_rounded_weights_win_up_to_a_fifth_of_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    for residual, wins in ((1.9e-4, True), (2.1e-4, False), (math.inf, False)):
        track = Track(monkeypatch)
        track.residual = residual
        winner = track.run([SHORT, ROUNDED], short=9.5, rounded=5.0)
        assert winner is not None
        assert name_of(winner.solver) == ("rounded" if wins else "short")


@pytest.mark.parametrize(
    ("solver", "sweeps", "name"),
    [(WHOLE, (3, 9), "0 + 8 sweeps"), (LOWERED, (9, 4), "3 + 5 sweeps"), (WHOLE, (1, 1), "0 + 1 sweeps")],
)
def test_all_tokens_at_once_also_run_with_the_number_of_sweeps_that_they_took(
    solver: jf.Solver, sweeps: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last one, which changes nothing: sweeps in bfloat16 count, and one sweep is the least."""
    track = Track(monkeypatch)
    track.sweeps = sweeps
    winner = track.run([solver], whole=5.0, lowered=5.0, sweeps=[4.0])
    assert winner is not None
    assert name_of(winner.solver) == name == track.runs[-1]
    assert winner.seconds == 4.0


def test_the_exact_loop_takes_its_time_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch_size, seconds, wins in ((2, 9.0, True), (2, 10.0, False), (1, 19.0, True), (1, 20.0, False)):
        winner = Track(monkeypatch, batch_size).run([SHORT], short=seconds)
        assert (winner is not None) == wins


def test_those_near_the_best_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones once and short ones twice; the first timing does not count for their spread."""
    track = Track(monkeypatch)
    for short, long, runs, spreads, best in (
        ([4.0, 4.1], [4.3, 3.9], "short long short long", [0.0, 0.0], 3.9),
        ([0.04, 0.06, 0.066], [0.042, 0.03, 0.036], "short long short short long long", [0.05, 0.1], 0.03),
        ([4.0], [4.5], "short long", [], 4.0),
        ([9.5, 9.8], [12.0], "short long short", [0.0], 9.5),  # near the exact loop
        ([10.5, 9.8], [12.0], "short long short", [0.0], 9.8),
    ):  # fmt: skip
        track.race._last, track.race.spreads = {}, []
        winner = track.run([SHORT, LONG], short=short, long=long)
        assert " ".join(track.runs) == runs
        assert track.race.spreads == pytest.approx(spreads)
        assert winner is not None
        assert winner.seconds == pytest.approx(best)


@pytest.mark.parametrize(
    ("seconds", "others"),
    [(3.9, ["whole"]), (3.2, ["whole"]), (5.1, ["whole"]), (3.0, ["whole", "short"]), (5.3, ["whole", "short"])],
)
def test_only_those_near_the_leader_run_if_it_takes_its_time_again(
    seconds: float, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    track = Track(monkeypatch)
    track.run([WHOLE, SHORT, LONG], whole=4.2, short=9.0, long=4.0)
    track.run([WHOLE, SHORT, LONG], whole=9.0, short=9.0, long=seconds)
    assert track.runs == ["long", *others]
    assert track.run([WHOLE, SHORT], whole=9.0, short=9.0) is not None  # a leader that does not run is none


def test_a_leader_by_its_number_of_sweeps_leads_the_next_race(monkeypatch: pytest.MonkeyPatch) -> None:
    track = Track(monkeypatch)
    track.run([SHORT, WHOLE], short=9.0, whole=5.0, sweeps=[4.0])
    track.run([SHORT, WHOLE], short=9.0, whole=5.0, sweeps=[4.0])
    assert track.runs == ["whole", "0 + 8 sweeps"]


def test_after_the_time_limit_only_the_leader_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    track = Track(monkeypatch, time_limit=7.0)
    track.run([SHORT], short=7.0)
    track.run([SHORT, LONG], short=2.0, long=1.0)
    assert track.runs == ["short", "long"]  # the limit itself is in time
    assert track.run([SHORT, LONG], short=2.0, long=5.0).solver == LONG
    assert track.runs == ["long"]
    assert not track.race.is_over
    assert track.run([SHORT, LONG], short=2.0, long=12.0) is None
    assert track.race.is_over
    assert track.run([SHORT, LONG], short=2.0, long=1.0) is None
    assert track.runs == []


def test_the_exact_loop_and_an_evaluation_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long call once, a short one six times or until half a second is over; bfloat16 by sweeps of four samples."""
    machine = Machine(1.0, 0.01, low=0.25)
    block = machine.carry(small(), monkeypatch).blocks[1]
    exact = time_exact(block, Z, jf.Context(LABELS))
    loop, evaluation, sweep = (
        machine.seconds(6, *[1] * TOKENS), machine.seconds(6, TOKENS), machine.seconds(4, TOKENS)
    )  # fmt: skip
    assert machine.now == pytest.approx(loop + evaluation + (3 + 0.25 * (3 + 1)) * sweep, rel=0.002)
    assert exact == pytest.approx((loop, evaluation, 0.25 * evaluation, 0.0, math.inf), rel=0.05)
    assert exact.least_iteration == pytest.approx((3 * 0.25 + 2) * evaluation, rel=0.05)
    assert Exact(1.0, 0.1, math.inf, 0.0).least_iteration == pytest.approx(0.5)
    for call, number in ((0.01, 4), (0.001, 6)):
        machine = Machine(call, low=0.25)
        exact = time_exact(machine.carry(small(), monkeypatch).blocks[1], Z, jf.Context(LABELS), bf16=False)
        assert machine.now == pytest.approx(number * exact.loop + 6 * exact.evaluation)
        assert exact.bf16 == math.inf


def test_bfloat16_is_tried_if_it_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it takes less than 0.8 of the time, and the exact loop more than three evaluations."""
    few = 32 / 13  # seconds of a call for which 16 tokens one by one take three times as long as at once
    for call, low, pays in ((9.0, 0.7, True), (9.0, 0.9, False), (few - 0.01, 0.1, False), (few + 0.01, 0.1, True)):
        block = Machine(call, 0.25, low=low).carry(small(), monkeypatch).blocks[1]
        assert math.isfinite(time_exact(block, Z[:4], jf.Context(LABELS[:4])).bf16) == pays


@jf.register_piece("quarters")
@dataclass(frozen=True)
class Quarters(jf.Partition):
    """A partition of a reader's own, with candidates."""

    def stop(self, front: int, num_tokens: int) -> int:
        return (4 * front // num_tokens + 1) * num_tokens // 4

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[jf.Partition, ...]:
        return (cls(),) if num_tokens >= 4 else ()


def test_candidates_are_of_every_partition_with_the_fitted_pieces() -> None:
    fitted, slow, fast = fitted_block(), Exact(9.0, 1.0, math.inf, 0.0), Exact(9.0, 1.0, 0.5, 0.0)
    plain = candidates(196, 1e-4, None, slow)
    assert {solver.partition for solver in plain} == {jf.Whole(), jf.Window(32), jf.Window(64), Quarters()}
    assert {(solver.guess, solver.correction) for solver in plain} == {(jf.Latent(), jf.Plain())}
    assert {solver.stopping for solver in plain} == {jf.Tolerance(1e-4)}
    both = candidates(196, 1e-4, fitted, fast)
    assert len(both) == 2 * len(plain)
    assert {solver.bf16_sweeps for solver in both} == {0, 3}
    assert {(solver.guess, solver.correction) for solver in both} == {(fitted.guess, fitted.correction)}
    for seconds, number in ((7.9, 1), (8.1, 0)):  # a certificate takes one second
        solvers = candidates(196, 1e-4, fitted, slow._replace(int16=seconds))
        assert [solver for solver in solvers if solver.int16_weights] == [
            jf.Solver(jf.Sequential(), stopping=jf.Tolerance(1e-4), int16_weights=True)
        ] * number


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_winner_has_its_certified_answer_and_its_real_time(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01)
    block = machine.carry(small(), monkeypatch).blocks[1]
    exact = time_exact(block, Z[:batch_size], jf.Context(LABELS[:batch_size]))
    winner = Race(exact, batch_size, 1e-3, time_limit=1e9).run(block, Z[:4], LABELS[:4], [WHOLE, SHORT])
    assert winner is not None
    began = machine.now
    found = jf.solve_certified(block, Z[:4], winner.solver, LABELS[:4], batch_size=batch_size, tolerance=1e-3)
    assert winner.seconds == pytest.approx(machine.now - began)
    assert found.residual.max() <= 1e-3
    assert torch.equal(found.x, winner.x)
