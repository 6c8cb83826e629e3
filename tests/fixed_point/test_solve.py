"""Certificates, and the new solves of samples that fall short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.context import NO_CONTEXT
from tests.helpers.solver_problems import (
    FLOWS,
    OVERFLOWING,
    STRENGTHS,
    attempt,
    echoes,
    error,
    flow_problem,
    normal,
    steep_problem,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
CONVERGED, MAX_SWEEPS, ROUNDING, NONFINITE = jf.Status


@pytest.mark.parametrize("name", FLOWS)
def test_the_certificate_is_the_residual(name: str) -> None:
    problem = flow_problem(name)
    x = problem.answer + 0.3 * normal(*problem.z.shape)
    want = problem.residual(x)
    x[1, 2, 0], want[1] = torch.nan, torch.inf
    for batch_size in (None, 1, 2, 3, 5):
        residual, _ = jf.Problem.checked(problem.block, problem.z, problem.labels).residual(x, batch_size)
        torch.testing.assert_close(residual, want)
    watched = echoes()
    residual, _ = jf.Problem.checked(watched.block, watched.z, watched.labels).residual(watched.answer, 3)
    assert (residual < EXACT).all()
    assert watched.block.calls == [(0, 24, 3), (0, 24, 3), (0, 24, 1)]


@given(
    st.sampled_from(list(FLOWS)),
    st.builds(jf.Segments, st.integers(1, 9)) | st.builds(jf.Window, st.integers(1, 20)),
    st.floats(-10, -2).map(lambda exponent: 10**exponent),
    st.none() | st.integers(1, 3),
)
def test_any_plan_ends_with_every_residual_within_tolerance(
    name: str, partition: jf.Partition, tolerance: float, batch_size: int | None
) -> None:
    problem, solver = flow_problem(name), jf.Solver(partition)
    solution = jf.solve(problem.block, problem.z, solver, problem.labels, tolerance=tolerance, batch_size=batch_size)
    assert (solution.status == CONVERGED).all()
    assert (solution.residual <= tolerance).all()
    assert (problem.residual(solution.x) <= tolerance + 1e-12).all()
    assert (
        error(solution.x, problem.answer) < 100 * tolerance
    )  # the recurrence amplifies a residual less than that here


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (jf.Solver(jf.Window(8), jf.Zeros()), 0.3), (jf.Solver(jf.Window(8), jf.Zeros(), tolerance_factor=1e3), 1e-4),
        (jf.Solver(jf.Window(8), jf.Zeros(), jf.Stopping(2)), 1e-4),
        (jf.Solver(jf.Window(8), jf.Zeros(), jf.Stopping(ebound=0.05)), 1e-4),
    ],
)  # fmt: skip
def test_a_sample_above_the_tolerance_is_resumed_to_half_of_it(solver: jf.Solver, tolerance: float) -> None:
    """From its answer, with the same pieces; to the tolerance itself, it would often miss again (A.1)."""
    problem = echoes()
    raw = attempt(problem.block, problem.z, solver, problem.labels, tolerance=tolerance)
    short = problem.residual(raw.x) > tolerance
    assert short.any()
    resumed = jf.Solver(jf.Window(8), jf.WarmStart(raw.x[short]), tolerance_factor=0.5)
    again = attempt(problem.block, problem.z[short], resumed, STRENGTHS[short], tolerance=tolerance)
    solution = jf.solve(problem.block, problem.z, solver, problem.labels, tolerance=tolerance)
    want = raw.x.index_put((short,), again.x)
    assert torch.equal(solution.x, want)
    torch.testing.assert_close(solution.residual, problem.residual(want))
    assert (solution.residual <= tolerance).all() and (solution.status == CONVERGED).all()
    assert not solution.used_fallback.any()
    sweeps = raw.sample_sweeps.index_put((short,), again.sample_sweeps, accumulate=True)
    assert torch.equal(solution.sample_sweeps, sweeps)
    assert solution.network_calls == solution.sweeps + 2 == raw.sweeps + again.sweeps + 2
    assert solution.token_evaluations == raw.token_evaluations + again.token_evaluations + 24 * (7 + int(short.sum()))


@pytest.mark.parametrize("stopping", [jf.Stopping(2), jf.Stopping((30, 1, 30))], ids=str)
def test_a_sample_that_misses_the_tolerance_without_a_certificate_is_solved_sequentially(stopping: jf.Stopping) -> None:
    problem, solver = flow_problem("nvp 25x4"), jf.Solver(jf.Segments(3), stopping=stopping)
    raw = attempt(problem.block, problem.z, solver, tolerance=1e-9)
    solution = jf.solve(problem.block, problem.z, solver, tolerance=1e-9, certify=False)
    assert (solution.status == CONVERGED).all()
    assert error(solution.x, problem.answer) < EXACT
    assert solution.used_fallback.all()
    assert solution.exact.all()
    assert solution.sample_sweeps.tolist() == [raw.sweeps + 25] * 3
    assert solution.network_calls == solution.sweeps == raw.sweeps + 25
    assert solution.token_evaluations == raw.token_evaluations + 75


def test_a_sample_within_the_tolerance_after_its_last_sweep_has_converged() -> None:
    """It ran out of sweeps, yet its certificate is good."""
    problem, within = flow_problem("nvp 25x4"), 0
    for sweeps in range(6, 20):
        solver = jf.Solver(jf.Whole(), stopping=jf.Stopping(sweeps))
        raw = attempt(problem.block, problem.z, solver)
        good = problem.residual(raw.x) <= 1e-3
        solution = jf.solve(problem.block, problem.z, solver)
        assert torch.equal(solution.sample_sweeps > sweeps, ~good)
        assert torch.equal(solution.x[good], raw.x[good])
        assert (solution.status == CONVERGED).all()
        within += int((good & (raw.status == MAX_SWEEPS)).sum())
    assert within


def test_without_a_tolerance_sweep_counts_are_a_legitimate_end() -> None:
    problem = flow_problem("nvp 25x4")
    for stopping in (jf.Stopping(1), jf.Stopping(1, 1e-9)):
        solver = jf.Solver(jf.Segments(5), stopping=stopping)
        raw = attempt(problem.block, problem.z, solver, tolerance=None)
        solution = jf.solve(problem.block, problem.z, solver, tolerance=None)
        assert (solution.status == MAX_SWEEPS).all()
        assert not solution.used_fallback.any()
        assert torch.equal(solution.x, raw.x)
        torch.testing.assert_close(solution.residual, problem.residual(solution.x))
        assert solution.network_calls == solution.sweeps + 1 == 6


class Rounding:
    """x = z, but a pass over all four tokens adds `context` times the size of z to the last one, whatever x is.

    A network of low precision is like that: what it makes of all tokens at once is not what it makes of each.
    """

    is_pure = True

    def init_cache(self, z: Tensor, context: jf.Context = NO_CONTEXT) -> Any:
        return context.values

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, noise: Tensor) -> Tensor:
        g = z.clone()
        g[:, -1] += (noise * z.abs().amax(dim=(1, 2))).view(-1, 1) * (stop - start == 4)
        return g[:, start:stop]


NOISE = [0.5, 1.5, 2.0, 2.5, 9.0, 40.0, 40.0, 41.0, 900.0]
HALVES = jf.Segments(2)  # sweeps of two tokens: none sees the noise, and every certificate does


def rounded(
    solver: jf.Solver, noise: Sequence[float] = NOISE, sizes: Sequence[float] | None = None, *,
    tolerance: float = 1.0, certify: Any = True,
) -> jf.Solution:  # fmt: skip
    z = normal(len(noise), 4, 1)
    z *= torch.tensor(sizes or [1.0] * len(noise)).view(-1, 1, 1) / z.abs().amax(dim=(1, 2), keepdim=True)
    context = torch.tensor(noise, dtype=torch.float64)
    solution = jf.solve(Rounding(), z, solver, context, tolerance=tolerance, certify=certify)
    assert torch.equal(solution.x, z)
    return solution


def test_of_many_samples_four_exact_solves_tell_the_rounding() -> None:
    """The least that they leave, 40: it is known of 2.5 and 9, but 1.5 and 2 may come from the sweeps."""
    solution = rounded(jf.Solver(HALVES))
    assert solution.residual.tolist() == pytest.approx(NOISE)
    assert solution.status.tolist() == [CONVERGED] + [ROUNDING] * 8
    resolved = [1.5, 2.0, 40.0, 40.0, 41.0, 900.0]
    assert [NOISE[n] for n in solution.used_fallback.nonzero()] == resolved
    # Two sweeps and a certificate, as many for those resumed, five calls for the four, and five for the other two.
    assert solution.sample_sweeps.tolist() == [2 + 2 * (noise > 1) + 4 * (noise in resolved) for noise in NOISE]
    assert solution.network_calls == 3 + 3 + 5 + 5


def test_rounding_grows_with_x_and_is_the_smallest_that_exact_solves_leave() -> None:
    """It is 0.01 here; residuals of 7 and 9 of x of size 200 are 3.5 and 4.5 times that."""
    noise, sizes = [0.01] * 3 + [9.0, 0.035, 0.045], [1000.0] * 3 + [2.0, 200.0, 200.0]
    solution = rounded(jf.Solver(HALVES), noise, sizes)
    assert solution.network_calls == 3 + 3 + 5 + 5  # the last one is solved after the first four
    assert solution.used_fallback.tolist() == [True] * 4 + [False, True]


def test_few_samples_are_solved_exactly_and_uncertified_ones_not() -> None:
    one = rounded(jf.Solver(HALVES), [3.0])
    assert (one.network_calls, one.status.tolist()) == (3 + 3 + 5, [ROUNDING])
    swept = rounded(jf.Solver(HALVES), certify=False)
    assert (swept.network_calls, swept.status.tolist()) == (2, [CONVERGED] * 9)
    # An exact loop is not repeated, and shows the rounding if it is measured.
    exact = rounded(jf.Solver(jf.Sequential()))
    assert (exact.network_calls, exact.residual.max(), exact.exact.all()) == (4, 0, True)
    exact = rounded(jf.Solver(jf.Sequential()), certify="always")
    assert exact.network_calls == 4 + 1
    assert exact.status.tolist() == [CONVERGED] + [ROUNDING] * 8
    assert not exact.used_fallback.any()


def test_an_exact_answer_whose_next_number_is_beyond_the_tolerance_is_rounded() -> None:
    """Numbers near 10^13 are 0.002 apart in float64."""
    solution = rounded(jf.Solver(jf.Sequential()), [0.0] * 3, [1.0, 1e12, 1e13], tolerance=1e-3)
    assert solution.status.tolist() == [CONVERGED, CONVERGED, ROUNDING] and solution.exact.all()
    assert solution.residual.tolist() == pytest.approx([0.0, 0.0, 0.0022], rel=0.1)


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize(("solver", "tolerance"), [*OVERFLOWING, (jf.Solver(jf.Sequential()), 1e-9)], ids=str)
def test_a_sample_that_overflows_is_solved_sequentially(
    solver: jf.Solver, tolerance: float | None, certificate: bool
) -> None:
    """A value that stays non-finite is so in the exact inverse; the other samples come to no harm."""
    problem = steep_problem([0, 1, 2, 1])
    raw = attempt(problem.block, problem.z, solver, problem.labels, tolerance=tolerance)
    solution = jf.solve(problem.block, problem.z, solver, problem.labels, tolerance=tolerance, certify=certificate)
    assert solution.residual[2] == torch.inf
    assert (solution.x[2, 4:] == torch.inf).all()
    again = (raw.status == NONFINITE) & ~raw.exact
    assert solution.used_fallback[again].all()
    assert not solution.used_fallback[raw.exact].any()
    tame = MAX_SWEEPS if tolerance is None else CONVERGED
    assert solution.status.tolist() == [tame, CONVERGED, NONFINITE, CONVERGED]
    solved = [1, 3] if tame == MAX_SWEEPS else [0, 1, 3]
    assert error(solution.x[solved], problem.answer[solved]) < 1e-7


@pytest.mark.parametrize("name", ["digits-p1", "digits-maf"])
@pytest.mark.parametrize("guidance", [None, jf.Guidance(1.0)])
def test_batches_of_an_exact_loop_have_the_bits_of_calls_by_themselves(name: str, guidance: jf.Guidance | None) -> None:
    """A batch of 40 is more than a thread takes at once."""
    block, z, labels = jf.load(name).guided(guidance).inverse_block(0), normal(90, 64, 1).float(), torch.arange(90) % 10
    for batch_size in (1, 7, 40):
        parts = zip(z.split(batch_size), labels.split(batch_size), strict=True)
        want = [block.sequential_inverse(part, jf.Context(own)) for part, own in parts]
        found = block.sequential_inverse(z, jf.Context(labels), batch_size=batch_size)
        for have, each in zip(found, zip(*want, strict=True), strict=True):
            assert torch.equal(have, torch.cat(each))


def test_temperatures_of_a_context_count_in_the_exact_loop() -> None:
    block, z = jf.load("digits-p1").blocks[0], normal(2, 64, 1).float()
    context = jf.Context(torch.tensor([3, 7]), torch.tensor([0.2, 1.5]))
    solution = jf.solve(block, z, jf.Solver(jf.Sequential()), context, certify="always")
    assert solution.backend == "native" and solution.residual.max() < 1e-4
    assert error(solution.x, jf.solve(block, z, jf.Solver(jf.Sequential()), context.values).x) > 1e-2
    with pytest.raises(ValueError, match=r"temperature=.*: give a row for each of the 2 rows of z"):
        jf.solve(block, z, jf.Solver(), jf.Context(context.values, torch.ones(3)))
    with pytest.raises(ValueError, match="attn_temperature"):
        jf.sample(jf.load("digits-p1"), 2, context=context)
