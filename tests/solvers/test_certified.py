"""What a certificate measures, and what is done about samples that fall short."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import gs_jacobi
from solver_problems import FLOWS, OVERFLOWING, STRENGTHS, echoes, error, flow_problem, normal, steep_problem
from torch import Tensor

import jacobiflow as jf
from jacobiflow.solvers import Given, Stopping

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
CONVERGED, MAX_SWEEPS, ROUNDING, NONFINITE = jf.Status


@pytest.mark.parametrize("name", FLOWS)
def test_the_certificate_is_the_residual(name: str) -> None:
    problem = flow_problem(name)
    x = problem.answer + 0.3 * normal(*problem.z.shape)
    want = problem.residual(x)
    x[1, 2, 0], want[1] = torch.nan, torch.inf
    for slots in (None, 1, 2, 3, 5):
        torch.testing.assert_close(jf.certify(problem.block, problem.z, x, problem.labels, slots), want)
    watched = echoes()
    assert (jf.certify(watched.block, watched.z, watched.answer, watched.labels, 3) < EXACT).all()
    assert watched.block.calls == [(0, 24, 3), (0, 24, 3), (0, 24, 1)]


@given(
    st.sampled_from(list(FLOWS)),
    st.builds(jf.Segments, st.integers(1, 9)) | st.builds(jf.Window, st.integers(1, 20)),
    st.floats(-10, -2).map(lambda exponent: 10**exponent),
    st.none() | st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_any_plan_ends_with_every_residual_within_tolerance(
    name: str, partition: jf.Partition, atol: float, slots: int | None
) -> None:
    problem = flow_problem(name)
    solver = jf.Solver(partition, stopping=jf.Tolerance(atol))
    found = jf.solve_certified(problem.block, problem.z, solver, problem.labels, slots=slots)
    assert (found.status == CONVERGED).all()
    assert (found.residual <= atol).all()
    assert (problem.residual(found.x) <= atol + 1e-12).all()
    assert error(found.x, problem.answer) < 100 * atol  # the recurrence amplifies a residual less than that here


# --------------------------------------------------------------------------------------- solved again, and counted


def test_a_sample_above_the_tolerance_is_resumed_to_half_of_it() -> None:
    """From where it stands, with the same pieces; to the tolerance itself, it would often miss again (A.1)."""
    problem, found_short = echoes(), 0
    for atol, tolerance in ((1e-2, None), (1e-1, None), (1e-1, 1e-4)):
        for slots in (None, 3):
            solver = jf.Solver(jf.Window(8), jf.Zeros(), jf.Tolerance(atol))
            wanted = tolerance or atol
            raw = jf.solve(problem.block, problem.z, solver, problem.labels, slots)
            short = problem.residual(raw.x) > wanted
            again = jf.solve(
                problem.block, problem.z[short],
                jf.Solver(jf.Window(8), Given(raw.x[short]), jf.Tolerance(wanted / 2)), STRENGTHS[short], slots,
            )  # fmt: skip
            found = jf.solve_certified(
                problem.block, problem.z, solver, problem.labels, slots=slots, tolerance=tolerance
            )
            want = raw.x.index_put((short,), again.x)
            assert torch.equal(found.x, want)
            torch.testing.assert_close(found.residual, problem.residual(want))
            assert (found.residual <= wanted).all()
            assert not found.resolved_sequentially.any()
            sweeps = raw.sample_sweeps.index_put((short,), again.sample_sweeps, accumulate=True)
            assert torch.equal(found.sample_sweeps, sweeps)
            assert found.sweeps == raw.sweeps + again.sweeps
            passes = sum(math.ceil(n / (slots or 7)) for n in (7, int(short.sum())))
            assert found.network_calls == found.sweeps + passes
            evaluations = raw.token_evaluations + again.token_evaluations + 24 * (7 + int(short.sum()))
            assert found.token_evaluations == evaluations
            found_short += int(short.sum())
    assert found_short >= 10


def test_real_samples_that_are_resumed_are_not_solved_sequentially() -> None:
    """A.1: digits-p1 by windows of 8 took 225 network calls, as one sample missed again at the tolerance itself."""
    flow = jf.load("digits-p1")
    out = jf.sample(flow, 16, torch.arange(16) % 10, seed=0, strategy="window:8", tolerance=1e-3, progress=False)
    assert out.resolved_sequentially == 0
    assert out.network_calls < 200
    assert (out.certificate <= 1e-3).all()


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize("stopping", [jf.MaxSweeps(2), jf.MaxSweeps((30, 1, 30)), jf.EarlyStop(0.05)], ids=str)
def test_a_sample_that_misses_the_solver_s_tolerance_is_solved_sequentially_and_counted(
    stopping: Stopping, certificate: bool
) -> None:
    """With certificates, the worst of them goes first."""
    problem = flow_problem("nvp 25x4")
    solver = jf.Solver(jf.Segments(3), stopping=stopping | jf.Tolerance(1e-9))
    raw = jf.solve(problem.block, problem.z, solver)
    found = jf.solve_certified(problem.block, problem.z, solver, certificate=certificate)
    if stopping.max_sweeps is None and certificate:  # it ended, and so is resumed
        assert not found.resolved_sequentially.any()
        assert (found.residual <= 1e-9).all()
        return
    assert (found.status == CONVERGED).all()
    assert error(found.x, problem.answer) < EXACT
    assert found.resolved_sequentially.all()
    assert found.exact.all()
    assert found.sample_sweeps.tolist() == [raw.sweeps + 25] * 3
    assert found.sweeps == raw.sweeps + (50 if certificate else 25)
    assert found.network_calls == found.sweeps + 3 * certificate
    assert found.token_evaluations == raw.token_evaluations + 75 * (3 if certificate else 1)


def test_a_sample_that_its_last_sweep_brought_within_tolerance_is_no_miss() -> None:
    """It ran out of sweeps, yet its certificate is good."""
    problem, within = flow_problem("nvp 25x4"), 0
    for sweeps in range(6, 20):
        solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-3) | jf.MaxSweeps(sweeps))
        raw = jf.solve(problem.block, problem.z, solver)
        good = problem.residual(raw.x) <= 1e-3
        found = jf.solve_certified(problem.block, problem.z, solver)
        assert torch.equal(found.resolved_sequentially, ~good)
        assert torch.equal(found.x[good], raw.x[good])
        assert (found.status == CONVERGED).all()
        within += int((good & (raw.status == MAX_SWEEPS)).sum())
    assert within
    loose = jf.solve_certified(
        problem.block, problem.z, jf.Solver(jf.Whole(), stopping=solver.stopping), tolerance=10.0
    )
    assert not loose.resolved_sequentially.any()


def test_sweep_counts_alone_are_a_legitimate_end() -> None:
    problem = flow_problem("nvp 25x4")
    for stopping in (jf.MaxSweeps(1), jf.EarlyStop(1e-9) | jf.MaxSweeps(1)):
        solver = jf.Solver(jf.Segments(5), stopping=stopping)
        found = jf.solve_certified(problem.block, problem.z, solver)
        assert (found.status == MAX_SWEEPS).all()
        assert not found.resolved_sequentially.any()
        assert error(found.x, gs_jacobi(problem.g, problem.z, [5, 10, 15, 20, 25], 1)) < EXACT
        torch.testing.assert_close(found.residual, problem.residual(found.x))
        assert found.network_calls == found.sweeps + 1 == 6
    # A tolerance of the caller's is held against them, and a certificate is what tells.
    found = jf.solve_certified(problem.block, problem.z, solver, tolerance=1e-6)
    assert (found.status == CONVERGED).all()
    assert (found.residual <= 1e-6).all()
    assert not found.resolved_sequentially.any()
    unmeasured = jf.solve_certified(problem.block, problem.z, solver, certificate=False, tolerance=1e-6)
    assert torch.equal(unmeasured.x, jf.solve(problem.block, problem.z, solver).x)


# ------------------------------------------------------------------------------------------------ rounding (A.2)


class Rounding:
    """x = z, but a pass over all four tokens adds `context` to the last one, whatever x is.

    A network of low precision is like that: what it makes of all tokens at once is not what it makes of each.
    """

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> Any:
        return context

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, noise: Tensor) -> Tensor:
        g = z.clone()
        g[:, -1] += noise.view(-1, 1) * (stop - start == 4)
        return g[:, start:stop]


NOISE = [0.5, 1.5, 2.0, 2.5, 9.0, 40.0, 41.0]
HALVES = jf.Segments(2)  # sweeps of two tokens: none sees the noise, and every certificate does


def rounded(solver: jf.Solver, noise: list[float] = NOISE, **arguments: Any) -> jf.Solution:
    found = jf.solve_certified(
        Rounding(), normal(len(noise), 4, 1), solver, torch.tensor(noise, dtype=torch.float64), **arguments
    )
    assert torch.equal(found.x, normal(len(noise), 4, 1))
    return found


@pytest.mark.parametrize(
    ("rounding", "resumed", "resolved", "calls", "passed_on"),
    [
        # Two sweeps and a certificate; as many for those resumed; five for the worst, and five for the rest.
        (0.0, [1.5, 2.0, 2.5, 9.0, 40.0, 41.0], [1.5, 2.0, 41.0], 3 + 3 + 5 + 5, 41.0),
        # Residuals up to four times what an earlier block left are rounding; those up to two tolerances are not.
        (10.0, [1.5, 2.0, 41.0], [1.5, 2.0, 41.0], 3 + 3 + 5 + 5, 41.0),
        (100.0, [1.5, 2.0], [1.5, 2.0], 3 + 3 + 5 + 5, 100.0),
    ],
)
def test_what_the_worst_sample_s_exact_solve_leaves_is_rounding(
    rounding: float, resumed: list[float], resolved: list[float], calls: int, passed_on: float
) -> None:
    found = rounded(jf.Solver(HALVES, stopping=jf.Tolerance(1.0)), rounding=rounding)
    assert found.residual.tolist() == pytest.approx(NOISE)
    assert found.status.tolist() == [CONVERGED] + [ROUNDING] * 6
    assert [NOISE[n] for n in found.resolved_sequentially.nonzero()] == resolved
    assert found.sample_sweeps.tolist() == [2 + 2 * (noise in resumed) + 4 * (noise in resolved) for noise in NOISE]
    assert found.network_calls == calls
    assert found.rounding == pytest.approx(passed_on)


def test_rounding_is_found_by_one_sample_too_and_by_no_uncertified_one() -> None:
    tolerance = jf.Tolerance(1.0)
    one = rounded(jf.Solver(HALVES, stopping=tolerance), [9.0])
    assert (one.network_calls, one.status.tolist(), one.rounding) == (3 + 3 + 5, [ROUNDING], pytest.approx(9))
    swept = rounded(jf.Solver(HALVES, stopping=tolerance), certificate=False)
    assert (swept.network_calls, swept.status.tolist(), swept.rounding) == (2, [CONVERGED] * 7, 0)
    # An exact loop is not repeated, and shows the rounding where it is measured; nothing is above a tolerance of 50.
    exact = rounded(jf.Solver(jf.Sequential(), stopping=tolerance))
    assert (exact.network_calls, exact.rounding, exact.residual.max(), exact.exact.all()) == (4, 0, 0, True)
    exact = rounded(jf.Solver(jf.Sequential(), stopping=tolerance), certificate="always")
    assert (exact.network_calls, exact.rounding) == (4 + 1, pytest.approx(41))
    assert exact.status.tolist() == [CONVERGED] + [ROUNDING] * 6
    assert not exact.resolved_sequentially.any()
    wide = rounded(jf.Solver(HALVES, stopping=jf.Tolerance(50.0)))
    assert (wide.network_calls, wide.status.tolist(), wide.rounding) == (3, [CONVERGED] * 7, 0)


@pytest.mark.parametrize("own", [True, False], ids=["own tolerance", "the caller's"])
def test_rounding_ends_samples_that_ran_out_of_sweeps_too(own: bool) -> None:
    stopping = jf.MaxSweeps(1) | jf.Tolerance(1.0) if own else jf.MaxSweeps(1)
    solver = jf.Solver(HALVES, jf.Zeros(), stopping)
    found = rounded(solver, rounding=100.0, tolerance=1.0)
    assert found.status.tolist() == [CONVERGED] + [ROUNDING] * 6
    assert [NOISE[n] for n in found.resolved_sequentially.nonzero()] == [1.5, 2.0]
    assert (rounded(solver).status.tolist() == [CONVERGED] + [ROUNDING] * 6) == own


def test_a_bfloat16_network_is_not_solved_token_by_token() -> None:
    """A.2, on real weights: a tolerance below the rounding took 503 network calls, 4 of 4 samples sequentially."""
    flow = copy.deepcopy(jf.load("digits-p1")).bfloat16()
    out = jf.sample(flow, 4, torch.arange(4), seed=0, strategy="window:8", tolerance=1e-4, progress=False)
    assert out.resolved_sequentially == 1
    assert out.network_calls < 300
    assert (out.status == ROUNDING).all()


# ------------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize("solver", [*OVERFLOWING, jf.Solver(jf.Sequential())], ids=str)
def test_a_sample_that_overflows_is_solved_sequentially(solver: jf.Solver, certificate: bool) -> None:
    """What remains non-finite is so in the exact inverse; the others come to no harm."""
    problem = steep_problem([0, 1, 2, 1])
    raw = jf.solve(problem.block, problem.z, solver, problem.labels)
    found = jf.solve_certified(problem.block, problem.z, solver, problem.labels, certificate)
    assert found.residual[2] == torch.inf
    assert (found.x[2, 4:] == torch.inf).all()
    again = (raw.status == NONFINITE) & ~raw.exact
    assert found.resolved_sequentially[again].all()
    assert not found.resolved_sequentially[raw.exact].any()
    tame = MAX_SWEEPS if solver.stopping.atol is None else CONVERGED
    assert found.status.tolist() == [tame, CONVERGED, NONFINITE, CONVERGED]
    solved = [1, 3] if tame == MAX_SWEEPS else [0, 1, 3]
    assert error(found.x[solved], problem.answer[solved]) < 1e-7
