"""Races on a machine whose every second is known: who runs, who is abandoned, and who wins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.strategy.race import Exact, Race, candidates, time_exact
from tests.helpers.invented import TOKENS, Machine, fitted_block, small

pytestmark = pytest.mark.usefixtures("one_thread")

Z = draw_latents(4, TOKENS, 4)
LABELS = torch.arange(4) % 3
SOLVERS = [jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-3)), jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-3))]


def test_the_exact_loop_and_an_evaluation_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01, low=0.25)
    block = machine.carry(small(), monkeypatch).blocks[1]
    exact = time_exact(block, Z, LABELS)
    assert exact.loop == pytest.approx(machine.seconds(4, *[1] * TOKENS))
    assert exact.evaluation == pytest.approx(machine.seconds(4, TOKENS))
    assert exact.bf16 == pytest.approx(0.25 * exact.evaluation, rel=0.1)
    assert exact.spread == 0
    assert exact.least_iteration == pytest.approx((3 * 0.25 + 2) * exact.evaluation, rel=0.1)
    block = Machine(1.0, 0.01, low=0.9).carry(small(), monkeypatch).blocks[1]
    assert time_exact(block, Z, LABELS).bf16 == math.inf
    assert Exact(1.0, 0.1, math.inf, 0.0).least_iteration == pytest.approx(0.5)


@jf.register("quarters")
@dataclass(frozen=True)
class Quarters(jf.Partition):
    """A partition of a reader's own, with candidates."""

    def stop(self, front: int, num_tokens: int) -> int:
        return (4 * front // num_tokens + 1) * num_tokens // 4

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[jf.Partition, ...]:
        return (cls(),)


def test_candidates_are_of_every_partition_with_the_fitted_pieces() -> None:
    fitted, slow, fast = fitted_block(), Exact(9.0, 1.0, math.inf, 0.0), Exact(9.0, 1.0, 0.5, 0.0)
    plain = candidates(small().blocks[0], 196, 1e-3, None, slow)
    assert {solver.partition for solver in plain} == {jf.Whole(), jf.Window(32), jf.Window(64), Quarters()}
    assert {(solver.guess, solver.correction) for solver in plain} == {(jf.Latent(), jf.Plain())}
    both = candidates(small().blocks[0], 196, 1e-3, fitted, fast)
    assert len(both) == 2 * len(plain)
    assert {solver.bf16_sweeps for solver in both} == {0, 3}
    assert {(solver.guess, solver.correction) for solver in both} == {(fitted.guess, fitted.correction)}


def race(machine: Machine, flow: Any, batch_size: int = 4) -> Race:
    return Race(time_exact(flow.blocks[1], Z[:batch_size], LABELS[:batch_size]), batch_size, 1e-3, time_limit=1e9)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_the_fastest_wins_at_its_real_time(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01)
    flow = machine.carry(small(), monkeypatch)
    winner = race(machine, flow, batch_size).run(flow.blocks[1], Z, LABELS, SOLVERS)
    assert winner is not None
    began = machine.now
    for rows in (slice(first, first + batch_size) for first in range(0, 4, batch_size)):
        found = jf.solve_certified(flow.blocks[1], Z[rows], winner.solver, LABELS[rows], tolerance=1e-3)
        assert found.residual.max() <= 1e-3
        assert torch.equal(found.x, winner.x[rows])
    assert winner.seconds == pytest.approx(machine.now - began)
    for solver in SOLVERS:
        began = machine.now
        for rows in (slice(first, first + batch_size) for first in range(0, 4, batch_size)):
            jf.solve_certified(flow.blocks[1], Z[rows], solver, LABELS[rows], tolerance=1e-3)
        assert winner.seconds <= machine.now - began + 1e-9


def test_a_slow_solver_is_abandoned_and_the_loop_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01, slower={1: 30.0})
    flow = machine.carry(small(), monkeypatch)
    contest = Race(Exact(20.0, 1.0, math.inf, 0.0), 4, 1e-3, time_limit=1e9)
    began = machine.now
    assert contest.run(flow.blocks[1], Z, LABELS, SOLVERS) is None
    assert machine.now - began < 3 * (20.0 + machine.seconds(4, TOKENS) * 30)  # a sweep beyond the limit each
    assert contest.run(flow.blocks[0], Z, LABELS, SOLVERS) is not None  # nothing of that is held against it here


def test_after_the_time_limit_only_the_leader_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, 0.01)
    flow = machine.carry(small(), monkeypatch)
    contest = Race(time_exact(flow.blocks[1], Z, LABELS), 4, 1e-3, time_limit=0.0)
    first = contest.run(flow.blocks[1], Z, LABELS, SOLVERS)
    assert first is not None
    began = machine.now
    second = contest.run(flow.blocks[1], Z, LABELS, SOLVERS)
    assert second is not None
    assert not contest.is_over
    assert machine.now - began <= 4 * first.seconds
