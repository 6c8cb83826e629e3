"""Every solver against the oracle's token-by-token answer, and the laws of Proposition 1 of the GS-Jacobi paper.

All flows are float64. An answer "is there" within 1e-10 of the largest value (of 1 where that is smaller): rounding,
1e-16, amplified by the recurrence, which was 1e-13 at most where measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Guide, Oracle, gs_jacobi, jacobi, sequential, sweeps_needed, to_tolerance, window_jacobi
from problems import REACHED, BlockProblem, Ledger, MixingBlock, latents, make_flow, to_float32
from torch import Tensor

import jacobiflow as jf
from jacobiflow.guidance import guided
from jacobiflow.solvers import Given, Stopping, solve_certified

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
plans = settings(max_examples=40, deadline=None, derandomize=True)

NVP9 = {"image_size": 6, "patch_size": 2, "num_classes": 3}
VP16 = {"image_size": 4, "patch_size": 1, "nvp": False}
NVP25 = {"image_size": 10, "patch_size": 2}
VP16_CLASSES = {"image_size": 8, "patch_size": 2, "in_channels": 3, "num_classes": 3, "nvp": False}
NVP25_CLASSES = {"image_size": 5, "patch_size": 1, "num_classes": 4}
NVP9_WIDE = {"image_size": 6, "patch_size": 2, "in_channels": 3}

CONSTANT = Guide(0.7, annealed=False, on="both", temperature=1.0)
ANNEALED = Guide(1.0, annealed=True, on="both", temperature=0.7)
SCALE = Guide(1.0, annealed=True, on="scale", temperature=1.0)
SHIFT = Guide(0.7, annealed=False, on="shift", temperature=0.7)

SETUPS: dict[str, tuple[dict[str, Any], Guide | None]] = {
    "nvp 9x4, classes": (NVP9, None),
    "nvp 9x4, classes, constant guidance": (NVP9, CONSTANT),
    "nvp 9x4, classes, annealed guidance": (NVP9, ANNEALED),
    "vp 16x1": (VP16, None),
    "vp 16x1, constant guidance of the shift": (VP16, SHIFT),
    "nvp 25x4": (NVP25, None),
    "vp 16x12, classes, annealed guidance": (VP16_CLASSES, ANNEALED),
    "nvp 25x1, classes, annealed guidance of the scale": (NVP25_CLASSES, SCALE),
    "nvp 9x12, annealed guidance": (NVP9_WIDE, ANNEALED),
}


@dataclass(frozen=True)
class Problem(BlockProblem):
    """One block to invert, and its map for some of the samples."""

    def g_of(self, rows: slice) -> Callable[[Tensor], Tensor]:
        """The map of some of the samples."""

        def g(x: Tensor) -> Tensor:
            full = self.answer.clone()
            full[rows] = x
            return self.g(full)[rows]

        return g


@cache
def problems(setup: str) -> tuple[Problem, ...]:
    """Both blocks of a setup, each at three samples (classes 0 and last, and no class); either permutation."""
    config, guide = SETUPS[setup]
    flow = make_flow(**config)
    oracle = Oracle(flow)
    labels = torch.tensor([0, flow.config.num_classes - 1, -1]) if flow.config.num_classes else None
    found = []
    for i, block in enumerate(flow.blocks):
        z = latents(flow, 3, seed=i)
        g = partial(_oracle_g, oracle, i, z, labels, guide)
        found.append(Problem(_guided(block, guide), g, z, labels, sequential(g, z)))
    return tuple(found)


def _oracle_g(oracle: Oracle, i: int, z: Tensor, labels: Tensor | None, guide: Guide | None, x: Tensor) -> Tensor:
    return oracle.g(i, x, z, labels, guide)


def _guided(block: Any, guide: Guide | None) -> Any:
    if guide is None:
        return block
    return guided(block, jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature))


@cache
def mixing(length: int = 17, channels: int = 2) -> Problem:
    """A block without attention or cache whose first entry is learned: its token 0 is not z_1."""
    block = MixingBlock(length, channels)
    z = normal(3, length, channels, seed=1)
    g = partial(block.g, z=z)
    answer = sequential(g, z)
    assert sweeps_needed(g, z, answer, REACHED) > length / 4
    return Problem(block, g, z, None, answer)


def error(x: Tensor, answer: Tensor) -> float:
    """Largest difference, relative to the largest value of the answer (to 1 where that is smaller)."""
    assert x.shape == answer.shape
    return float((x - answer).abs().max() / answer.abs().max().clamp(min=1)) if x.numel() else 0.0


def ends(length: int, count: int) -> list[int]:
    return [math.floor((i + 1) * length / count) for i in range(count)]


# ------------------------------------------------------------------------------------------------ the answer is reached

SOLVERS: dict[str, jf.Solver] = {
    "sequential": jf.Solver(jf.Sequential()),
    "whole": jf.Solver(jf.Whole(), stopping=jf.Tolerance(0)),
    "whole from zeros": jf.Solver(jf.Whole(), jf.Zeros(), jf.Tolerance(1e-12)),
    "segments 1": jf.Solver(jf.Segments(1), stopping=jf.Tolerance(1e-12)),
    "segments 2 from zeros": jf.Solver(jf.Segments(2), jf.Zeros(), jf.Tolerance(1e-12)),
    "segments 4": jf.Solver(jf.Segments(4), stopping=jf.Tolerance(0)),
    "window 1": jf.Solver(jf.Window(1), stopping=jf.Tolerance(1e-12)),
    "window 2": jf.Solver(jf.Window(2), stopping=jf.Tolerance(1e-12)),
    "window 5": jf.Solver(jf.Window(5), stopping=jf.Tolerance(0)),
    "window 8 from zeros": jf.Solver(jf.Window(8), jf.Zeros(), jf.Tolerance(1e-12)),
    "window beyond the end": jf.Solver(jf.Window(1000), stopping=jf.Tolerance(1e-12)),
    "tolerance and sweeps": jf.Solver(jf.Segments(3), stopping=jf.Tolerance(1e-12) | jf.MaxSweeps(30)),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("setup", SETUPS)
def test_reaches_the_sequential_answer(setup: str, solver: jf.Solver) -> None:
    for problem in problems(setup):
        solution = jf.solve(problem.block, problem.z, solver, problem.labels)
        assert error(solution.x, problem.answer) < EXACT
        assert (solution.status == jf.Status.CONVERGED).all()
        assert solution.sweeps <= problem.length


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("length", [3, 17])
def test_reaches_the_sequential_answer_of_a_block_with_a_learned_first_token(length: int, solver: jf.Solver) -> None:
    problem = mixing(length)
    if isinstance(solver.partition, jf.Segments) and solver.partition.count > length:
        solver = replace(solver, partition=jf.Segments(length))
    assert error(jf.solve(problem.block, problem.z, solver).x, problem.answer) < EXACT


@pytest.mark.parametrize("count", range(1, 18))
def test_segments_need_not_divide_the_tokens(count: int) -> None:
    problem = mixing(17)
    solution = jf.solve(problem.block, problem.z, jf.Solver(jf.Segments(count), stopping=jf.Tolerance(1e-12)))
    assert error(solution.x, problem.answer) < EXACT


@given(length=st.integers(1, 60), data=st.data())
@plans
def test_segments_tile_the_sequence_in_nearly_equal_lengths(length: int, data: st.DataObject) -> None:
    partition = jf.Segments(data.draw(st.integers(1, length)))
    stops = [partition.stop(front, length) for front in range(length)]
    assert all(front < stop <= length for front, stop in enumerate(stops))
    assert stops == sorted(stops)
    assert sorted(set(stops)) == ends(length, partition.count)
    lengths = [stops.count(stop) for stop in set(stops)]
    assert max(lengths) - min(lengths) <= 1


# --------------------------------------------------------------------------------------------- exactness: Proposition 1

FLOW_SETUP = "nvp 25x4"


@pytest.mark.parametrize("guess", [jf.Latent(), jf.Zeros()], ids=["latent", "zeros"])
@pytest.mark.parametrize("sweeps", [1, 2, 3, 7])
def test_k_sweeps_make_k_plus_one_tokens_exact_where_the_guess_has_the_first(sweeps: int, guess: Any) -> None:
    for problem in problems(FLOW_SETUP):
        x = jf.solve(problem.block, problem.z, jf.Solver(jf.Whole(), guess, jf.MaxSweeps(sweeps))).x
        assert error(x[:, : sweeps + 1], problem.answer[:, : sweeps + 1]) < EXACT
        assert error(x[:, sweeps + 1], problem.answer[:, sweeps + 1]) > REACHED  # and the law is tight
        assert error(x, jacobi(problem.g, guess(problem.z), sweeps)) < EXACT


@pytest.mark.parametrize("guess", [jf.Latent(), jf.Zeros()], ids=["latent", "zeros"])
@pytest.mark.parametrize("sweeps", [1, 2, 3, 7])
def test_k_sweeps_make_k_tokens_exact(sweeps: int, guess: Any) -> None:
    problem = mixing(17)
    x = jf.solve(problem.block, problem.z, jf.Solver(jf.Whole(), guess, jf.MaxSweeps(sweeps))).x
    assert error(x[:, :sweeps], problem.answer[:, :sweeps]) < EXACT
    assert error(x[:, sweeps], problem.answer[:, sweeps]) > REACHED
    assert error(x, jacobi(problem.g, guess(problem.z), sweeps)) < EXACT


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12, 25])
@pytest.mark.parametrize("setup", [FLOW_SETUP, "nvp 25x1, classes, annealed guidance of the scale"])
def test_a_segment_is_exact_after_as_many_sweeps_as_it_has_tokens(setup: str, count: int) -> None:
    """Its keys too: the segments after it would be wrong otherwise."""
    for problem in problems(setup):
        solver = jf.Solver(jf.Segments(count), stopping=jf.MaxSweeps(math.ceil(problem.length / count)))
        solution = jf.solve(problem.block, problem.z, solver, problem.labels)
        assert error(solution.x, problem.answer) < EXACT
        assert (solution.status == jf.Status.CONVERGED).all()
        assert (solution.residual == 0).all()


@pytest.mark.parametrize("setup", SETUPS)
def test_segments_of_one_token_are_sequential(setup: str) -> None:
    for problem in problems(setup):
        one = jf.solve(problem.block, problem.z, jf.Solver(jf.Sequential()), problem.labels)
        for partition in (jf.Segments(problem.length), jf.Window(1)):
            solver = jf.Solver(partition, stopping=jf.MaxSweeps(1))
            other = jf.solve(problem.block, problem.z, solver, problem.labels)
            assert torch.equal(one.x, other.x)
            assert (other.sweeps, other.network_calls) == (one.sweeps, one.network_calls)


@pytest.mark.parametrize("setup", SETUPS)
def test_sequential_makes_one_call_per_token(setup: str) -> None:
    for problem in problems(setup):
        solution = jf.solve(problem.block, problem.z, jf.Solver(jf.Sequential()), problem.labels)
        assert solution.sweeps == solution.network_calls == problem.length
        assert solution.token_evaluations == problem.length * len(problem.z)


def test_whole_counts_the_tokens_that_it_sweeps() -> None:
    """One token fewer each sweep, once its first tokens are exact; and a call per sweep."""
    problem = problems(FLOW_SETUP)[0]
    ledger = Ledger(problem.block)
    solution = jf.solve(ledger, problem.z, jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(3)))
    assert solution.sweeps == solution.network_calls == len(ledger.calls) == 3
    assert ledger.calls == [(0, 25), (1, 25), (2, 25)]
    assert solution.token_evaluations == (25 + 24 + 23) * len(problem.z)


# ------------------------------------------------------------------------------------------ cached keys are never stale


@pytest.mark.parametrize("sweeps", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("setup", [FLOW_SETUP, "vp 16x12, classes, annealed guidance", "vp 16x1"])
def test_gs_jacobi_is_that_of_no_cache(setup: str, count: int, sweeps: int) -> None:
    for problem, guess in zip(problems(setup), (jf.Latent(), jf.Zeros()), strict=True):
        solver = jf.Solver(jf.Segments(count), guess, jf.MaxSweeps(sweeps))
        solution = jf.solve(problem.block, problem.z, solver, problem.labels)
        reference = gs_jacobi(problem.g, guess(problem.z), ends(problem.length, count), sweeps)
        assert error(solution.x, reference) < EXACT
        if sweeps < problem.length // count - 1:
            assert error(reference, problem.answer) > REACHED  # stopped early, so that keys could be stale
            assert (solution.status == jf.Status.MAX_SWEEPS).all()


@pytest.mark.parametrize("sweeps", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 5, 9])
@pytest.mark.parametrize("setup", [FLOW_SETUP, "nvp 9x4, classes, constant guidance"])
def test_a_window_with_few_sweeps_is_that_of_no_cache(setup: str, size: int, sweeps: int) -> None:
    for problem, guess in zip(problems(setup), (jf.Zeros(), jf.Latent()), strict=True):
        solver = jf.Solver(jf.Window(size), guess, jf.MaxSweeps(sweeps))
        solution = jf.solve(problem.block, problem.z, solver, problem.labels)
        assert error(solution.x, window_jacobi(problem.g, guess(problem.z), size, sweeps)) < EXACT


@pytest.mark.parametrize("sweeps", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_uneven_gs_jacobi_is_that_of_no_cache(count: int, sweeps: int) -> None:
    problem = mixing(17)
    solution = jf.solve(problem.block, problem.z, jf.Solver(jf.Segments(count), stopping=jf.MaxSweeps(sweeps)))
    assert error(solution.x, gs_jacobi(problem.g, problem.z, ends(17, count), sweeps)) < EXACT


partitions = st.one_of(
    st.just(jf.Sequential()),
    st.just(jf.Whole()),
    st.builds(jf.Segments, st.integers(1, 16)),
    st.builds(jf.Window, st.integers(1, 20)),
)
guesses = st.sampled_from([jf.Latent(), jf.Zeros()])
tolerances = st.floats(-10, -2).map(lambda exponent: 10**exponent)
stoppings = st.one_of(
    st.builds(Stopping, atol=st.one_of(st.just(0.0), tolerances), max_sweeps=st.none() | st.integers(1, 8)),
    st.builds(jf.MaxSweeps, st.integers(1, 8)),
)


@given(solver=st.builds(jf.Solver, partitions, guesses, stoppings))
@plans
def test_no_plan_relies_on_stale_or_missing_keys(solver: jf.Solver) -> None:
    """Every cached position that an update may read was fed with the bits that it has now, or within the tolerance."""
    for problem in problems("vp 16x12, classes, annealed guidance")[:1]:
        ledger = Ledger(problem.block, slack=solver.stopping.atol or 0.0)
        jf.solve(ledger, problem.z, solver, problem.labels)


def test_the_ledger_sees_stale_keys() -> None:
    """The check above can fail."""
    problem = problems("vp 16x1")[0]
    ledger = Ledger(problem.block)
    cache = ledger.init_cache(problem.z)
    with pytest.raises(AssertionError, match="stale keys"):  # missing
        ledger.update(problem.z, problem.z, 2, 9, cache)
    ledger.update(problem.z, problem.z, 0, 9, cache)
    ledger.update(problem.z, problem.z, 9, 12, cache)
    with pytest.raises(AssertionError, match="stale keys"):
        ledger.update(problem.z + 1, problem.z, 9, 12, cache)


# -------------------------------------------------------------------------------- what a tolerance promises, and bounds


@cache
def amplification(problem: Problem) -> Tensor:
    """Per sample the largest row sum of |(I - Gamma)^-1|, Gamma the Jacobian of g at the answer.

    A residual r leaves the error (I - Gamma)^-1 r to first order, at most this times max |r|.
    """
    flat = problem.answer.flatten(1)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: problem.g(x.view_as(problem.answer)).flatten(1), flat, vectorize=True
    )
    rows = torch.stack([jacobian[n, :, n] for n in range(len(flat))])
    return torch.linalg.inv(torch.eye(flat.shape[1], dtype=torch.float64) - rows).abs().sum(dim=2).amax(dim=1)


@given(
    setup=st.sampled_from(["vp 16x1", "nvp 9x4, classes, annealed guidance", FLOW_SETUP]),
    partition=partitions, guess=guesses, atol=tolerances,
)  # fmt: skip
@plans
def test_any_plan_ends_with_every_residual_within_tolerance(
    setup: str, partition: Any, guess: Any, atol: float
) -> None:
    """And with an error within twice the residual's first-order amplification, the 2 for what is not of first order."""
    for problem in problems(setup):
        if isinstance(partition, jf.Segments):
            partition = jf.Segments(min(partition.count, problem.length))
        solver = jf.Solver(partition, guess, jf.Tolerance(atol))
        solution = solve_certified(problem.block, problem.z, solver, problem.labels)
        assert (solution.status == jf.Status.CONVERGED).all()
        residual = (problem.g(solution.x) - solution.x).abs().amax(dim=(1, 2))
        assert (residual <= atol + 1e-12).all()
        assert (solution.residual <= atol).all()
        paired = (solution.x - problem.answer).abs().amax(dim=(1, 2))
        assert (paired <= 2 * amplification(problem) * atol + EXACT).all()


@pytest.mark.parametrize("setup", SETUPS)
def test_the_certificate_is_the_residual(setup: str) -> None:
    for problem in problems(setup):
        x = problem.answer + 0.3 * normal(*problem.z.shape)
        expected = (problem.g(x) - x).abs().amax(dim=(1, 2))
        certificate = jf.certify(problem.block, problem.z, x, problem.labels)
        assert torch.allclose(certificate, expected, rtol=1e-10)
        assert (jf.certify(problem.block, problem.z, problem.answer, problem.labels) < EXACT).all()
        x[1, 2, 0] = torch.nan
        certificate = jf.certify(problem.block, problem.z, x, problem.labels)
        assert certificate[1] == torch.inf
        assert torch.allclose(certificate[[0, 2]], expected[[0, 2]], rtol=1e-10)


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_looser_tolerance_takes_fewer_sweeps() -> None:
    for problem in problems(FLOW_SETUP):
        sweeps = [
            jf.solve(problem.block, problem.z, jf.Solver(stopping=jf.Tolerance(atol)), problem.labels).sweeps
            for atol in (1e-1, 1e-3, 1e-6)
        ]
        assert sweeps[0] < sweeps[1] < sweeps[2] <= problem.length


@pytest.mark.parametrize("atol", [1e-2, 1e-5])
@pytest.mark.parametrize("partition", [jf.Whole(), jf.Segments(3), jf.Window(7), jf.Window(2)], ids=str)
@pytest.mark.parametrize("setup", [FLOW_SETUP, "nvp 9x4, classes, annealed guidance", "vp 16x1"])
def test_a_solve_to_a_tolerance_is_that_of_no_cache(setup: str, partition: Any, atol: float) -> None:
    """Iterates, sweeps and the swept residual. Keys of settled tokens are those before their last change.

    The batch shares the front of `Segments`. With `Whole` and `Window` each sample has its own: they are solved alone.
    """
    for problem, guess in zip(problems(setup), (jf.Latent(), jf.Zeros()), strict=True):
        solver = jf.Solver(partition, guess, jf.Tolerance(atol))
        stop_of = partial(partition.stop, num_tokens=problem.length)
        alone = [slice(n, n + 1) for n in range(3)]
        for rows in [slice(0, 3)] if isinstance(partition, jf.Segments) else alone:
            labels = None if problem.labels is None else problem.labels[rows]
            solution = jf.solve(problem.block, problem.z[rows], solver, labels)
            x, sweeps, largest = to_tolerance(problem.g_of(rows), guess(problem.z)[rows], stop_of, atol)
            assert error(solution.x, x) < EXACT
            assert solution.sweeps == sweeps
            assert torch.allclose(solution.residual, largest, rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------ samples, inputs and weights are left in peace

INDEPENDENT: dict[str, tuple[jf.Solver, float]] = {
    "sequential": (jf.Solver(jf.Sequential()), EXACT),
    "jacobi": (jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(4)), EXACT),
    "gs-jacobi": (jf.Solver(jf.Segments(3), jf.Zeros(), jf.MaxSweeps(2)), EXACT),
    "window of few sweeps": (jf.Solver(jf.Window(6), stopping=jf.MaxSweeps(2)), EXACT),
    "whole to a tolerance": (jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-6)), 1e-6),
    "window to a tolerance": (jf.Solver(jf.Window(6), stopping=jf.Tolerance(1e-6)), 1e-6),
}


@pytest.mark.parametrize(("solver", "scale"), INDEPENDENT.values(), ids=INDEPENDENT)
@pytest.mark.parametrize("setup", ["vp 16x12, classes, annealed guidance", FLOW_SETUP])
def test_a_sample_does_not_depend_on_the_batch(setup: str, solver: jf.Solver, scale: float) -> None:
    """To rounding where nothing adapts; where the batch shares a front, to twice the amplified tolerance."""
    for problem in problems(setup):
        together = solve_certified(problem.block, problem.z, solver, problem.labels).x
        allowed = scale if scale == EXACT else float(2 * amplification(problem).max() * scale)
        for rows in ([0], [2, 1]):
            labels = None if problem.labels is None else problem.labels[rows]
            alone = solve_certified(problem.block, problem.z[rows], solver, labels).x
            assert (alone - together[rows]).abs().max() <= allowed


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_inputs_and_weights_stay_and_results_repeat(solver: jf.Solver) -> None:
    config, guide = SETUPS["nvp 9x4, classes, annealed guidance"]
    flow = make_flow(**config)
    weights = {name: value.clone() for name, value in flow.state_dict().items()}
    z, labels, start = latents(flow, 3), torch.tensor([2, -1, 0]), latents(flow, 3, seed=3)
    kept = z.clone(), labels.clone(), start.clone()
    for solver_ in (solver, replace(solver, guess=Given(start))):
        block = _guided(flow.blocks[1], guide)
        first = solve_certified(block, z, solver_, labels)
        again = solve_certified(block, z, solver_, labels)
        assert torch.equal(first.x, again.x)
        assert torch.equal(first.residual, again.residual)
        assert first.x.data_ptr() not in (z.data_ptr(), start.data_ptr())
    assert all(torch.equal(a, b) for a, b in zip((z, labels, start), kept, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in flow.state_dict().items())


def test_a_given_guess_is_where_it_starts() -> None:
    for problem in problems(FLOW_SETUP):
        solver = jf.Solver(jf.Whole(), Given(problem.answer), jf.Tolerance(1e-10))
        assert jf.solve(problem.block, problem.z, solver, problem.labels).sweeps == 1


def test_an_answer_of_equal_bits_is_within_a_tolerance_of_0() -> None:
    z = normal(2, 20, 3)
    answer = jf.solve(CumulativeBlock(), z, jf.Solver(stopping=jf.Tolerance(0))).x
    again = jf.solve(CumulativeBlock(), z, jf.Solver(jf.Whole(), Given(answer), jf.Tolerance(0)))
    assert again.sweeps == 1
    assert torch.equal(again.x, answer)


# ---------------------------------------------------------------------------------------- how a solve can end otherwise


def test_max_sweeps_alone_is_a_legitimate_end() -> None:
    for problem in problems(FLOW_SETUP):
        solver = jf.Solver(jf.Segments(5), stopping=jf.MaxSweeps(1))
        solution = solve_certified(problem.block, problem.z, solver, problem.labels)
        assert (solution.status == jf.Status.MAX_SWEEPS).all()
        assert not solution.resolved_sequentially.any()
        assert error(solution.x, gs_jacobi(problem.g, problem.z, [5, 10, 15, 20, 25], 1)) < EXACT
        residual = (problem.g(solution.x) - solution.x).abs().amax(dim=(1, 2))
        assert torch.allclose(solution.residual, residual, rtol=1e-10)


@pytest.mark.parametrize("certificate", [True, False])
@pytest.mark.parametrize("partition", [jf.Whole(), jf.Segments(4), jf.Window(6)], ids=str)
def test_a_sample_that_misses_its_tolerance_is_solved_sequentially_and_counted(
    partition: Any, certificate: bool
) -> None:
    for problem in problems(FLOW_SETUP):
        solver = jf.Solver(partition, stopping=jf.Tolerance(1e-9) | jf.MaxSweeps(2))
        assert (jf.solve(problem.block, problem.z, solver, problem.labels).status == jf.Status.MAX_SWEEPS).all()
        solution = solve_certified(problem.block, problem.z, solver, problem.labels, certificate)
        assert solution.resolved_sequentially.all()
        assert (solution.status == jf.Status.CONVERGED).all()
        assert error(solution.x, problem.answer) < EXACT
        assert solution.network_calls >= solution.sweeps > problem.length


def test_a_sample_that_its_last_sweep_brought_within_tolerance_is_no_miss() -> None:
    """It ran out of sweeps, yet its certificate is good."""
    problem, found = problems(FLOW_SETUP)[0], 0
    for sweeps in range(6, problem.length):
        solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-3) | jf.MaxSweeps(sweeps))
        raw = jf.solve(problem.block, problem.z, solver)
        good = jf.certify(problem.block, problem.z, raw.x) <= 1e-3
        solution = solve_certified(problem.block, problem.z, solver)
        assert not solution.resolved_sequentially[good].any()
        assert torch.equal(solution.x[good], raw.x[good])
        assert (solution.status == jf.Status.CONVERGED).all()
        found += int((good & (raw.status == jf.Status.MAX_SWEEPS)).sum())
    assert found


@pytest.mark.parametrize("sweeps", [1, 3])
def test_the_swept_residual_of_few_sweeps_is_the_last_move(sweeps: int) -> None:
    for problem in problems(FLOW_SETUP):
        solver = jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(sweeps))
        solution = solve_certified(problem.block, problem.z, solver, problem.labels, certificate=False)
        move = jacobi(problem.g, problem.z, sweeps) - jacobi(problem.g, problem.z, sweeps - 1)
        assert torch.allclose(solution.residual, move.abs().amax(dim=(1, 2)), rtol=1e-9)


class LateBlock:
    """x_1 = z_1 + 5 x_0, which x_2 = z_2 + max(x_1 - 3, 0) does not feel before x_1 has moved."""

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> None:
        return None

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: None) -> Tensor:
        moves = torch.stack((torch.zeros_like(x[:, 0]), 5 * x[:, 0], (x[:, 1] - 3).relu()), dim=1)
        return (z + moves)[:, start:stop]


@pytest.mark.parametrize(
    ("start", "stopping"),
    [([1.0, 0.0, 0.0], jf.Tolerance(1e-3) | jf.MaxSweeps(1)), ([0.0, 0.0, 0.0], jf.MaxSweeps(1))],
    ids=str,
)
def test_a_token_behind_one_that_moves_is_not_converged(start: list[float], stopping: Stopping) -> None:
    """The moved token's new value is exact, but the tokens after it were computed from its old one."""
    z = torch.tensor([[[1.0], [0.0], [0.0]]])
    solver = jf.Solver(jf.Whole(), Given(torch.tensor(start).view(1, 3, 1)), stopping)
    solution = jf.solve(LateBlock(), z, solver)
    assert jf.certify(LateBlock(), z, solution.x) >= 2
    assert solution.status == jf.Status.MAX_SWEEPS
    if stopping.atol is not None:
        mended = solve_certified(LateBlock(), z, solver, certificate=False)
        assert mended.resolved_sequentially.all()
        assert mended.x.flatten().tolist() == [1, 5, 2]


def test_only_the_samples_that_miss_are_solved_again() -> None:
    """Row 1 starts at its answer, the others do not."""
    problem = problems(FLOW_SETUP)[0]
    start = problem.z.clone()
    start[1] = problem.answer[1]
    solver = jf.Solver(jf.Whole(), Given(start), jf.Tolerance(1e-9) | jf.MaxSweeps(3))
    solution = solve_certified(problem.block, problem.z, solver)
    assert solution.resolved_sequentially.tolist() == [True, False, True]
    assert (solution.status == jf.Status.CONVERGED).all()
    assert error(solution.x, problem.answer) < 1e-9 * float(2 * amplification(problem).max())


def test_a_last_token_that_is_exact_is_no_miss() -> None:
    """Row 1 starts at its answer but for its last token, which one sweep makes exact."""
    problem = problems(FLOW_SETUP)[0]
    start = problem.z.clone()
    start[1, :-1] = problem.answer[1, :-1]
    solver = jf.Solver(jf.Whole(), Given(start), jf.Tolerance(1e-9) | jf.MaxSweeps(1))
    solution = jf.solve(problem.block, problem.z, solver)
    assert [jf.Status(status) for status in solution.status.tolist()] == [
        jf.Status.MAX_SWEEPS, jf.Status.CONVERGED, jf.Status.MAX_SWEEPS,
    ]  # fmt: skip
    assert error(solution.x[1], problem.answer[1]) < EXACT


@pytest.mark.parametrize("partition", [jf.Sequential(), jf.Whole(), jf.Segments(4), jf.Window(6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tolerance_below_rounding_ends_and_says_so(partition: Any, dtype: torch.dtype) -> None:
    """Iterates may still come to equal bits (Whole often does): that is a residual of 0, and converged."""
    flow = to_float32(make_flow(**NVP25))
    z = latents(flow, 2)
    block = flow.blocks[0].to(dtype)
    solution = solve_certified(block, z, jf.Solver(partition, stopping=jf.Tolerance(1e-12)))
    assert torch.equal(solution.residual, jf.certify(block, z, solution.x))
    rounding = solution.status == jf.Status.ROUNDING
    assert torch.equal(rounding, solution.residual > 1e-12)
    assert (solution.status[~rounding] == jf.Status.CONVERGED).all()
    if isinstance(partition, jf.Sequential):
        assert rounding.all()
        assert not solution.resolved_sequentially.any()
    else:
        assert solution.resolved_sequentially[rounding].all()
    assert solution.x.dtype == torch.float32
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("atol", [0.0, 1e-3])
@pytest.mark.parametrize("certificate", [True, False])
def test_converged_is_said_of_nothing_above_the_tolerance(atol: float, certificate: bool) -> None:
    """In bfloat16 rounding is about 0.01: samples end within 1e-3 or not, and say which."""
    flow = to_float32(make_flow(**NVP9))
    block = flow.blocks[1].to(torch.bfloat16)
    z, labels = latents(flow, 6), torch.tensor([0, 1, 2, -1, 0, 1])
    solution = solve_certified(block, z, jf.Solver(jf.Window(4), stopping=jf.Tolerance(atol)), labels, certificate)
    converged = solution.status == jf.Status.CONVERGED
    assert torch.equal(converged, solution.residual <= atol)
    if certificate:
        assert torch.equal(solution.residual, jf.certify(block, z, solution.x, labels))


class FaultyBlock(MixingBlock):
    """Gives a wrong answer on one early call, as a stale cache or an unlucky kernel would."""

    def __init__(self, length: int, channels: int) -> None:
        super().__init__(length, channels)
        self.calls = 0

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> tuple[Tensor, Tensor]:
        log_scale, shift = super().affine(x, start, stop, cache)
        self.calls += 1
        if self.calls == 3:
            shift[1] += 1
        return log_scale, shift


@pytest.mark.parametrize("partition", [jf.Segments(4), jf.Window(2), jf.Whole()], ids=str)
def test_the_certificate_finds_a_wrong_answer_and_mends_it(partition: Any) -> None:
    problem = mixing(17)
    solver = jf.Solver(partition, stopping=jf.Tolerance(1e-8))
    wrong = jf.solve(FaultyBlock(17, 2), problem.z, solver)
    assert error(wrong.x[1], problem.answer[1]) > 1e-3
    solution = solve_certified(FaultyBlock(17, 2), problem.z, solver)
    assert (solution.status == jf.Status.CONVERGED).all()
    assert (solution.residual <= 1e-8).all()
    assert error(solution.x, problem.answer) < 1e-6
    assert not solution.resolved_sequentially.any()  # resumed from where it stood


# ------------------------------------------------------------------------------------------------------------- overflow

PARALLEL: dict[str, jf.Solver] = {
    "jacobi": jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-9)),
    "jacobi of 3 sweeps": jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(3)),
    "jacobi of 40 sweeps": jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(40)),
    "gs-jacobi": jf.Solver(jf.Segments(3), jf.Zeros(), jf.MaxSweeps(3)),
    "segments": jf.Solver(jf.Segments(3), stopping=jf.Tolerance(1e-9)),
    "window": jf.Solver(jf.Window(6), jf.Zeros(), jf.Tolerance(1e-9)),
    "window of few sweeps": jf.Solver(jf.Window(6), stopping=jf.Tolerance(1e-9) | jf.MaxSweeps(2)),
}


class SteepBlock(MixingBlock):
    """Rows with a context of 1 overflow away from their answer: the scale grows as e^(40 distance) of earlier tokens.

    Their answer is the tokens of `centre`, so that every |x - centre| is 0 there. Rows of context 0 are tame.
    """

    def __init__(self, length: int, channels: int) -> None:
        super().__init__(length, channels)
        self.centre = 1 + torch.arange(length * channels).reshape(length, channels).double() % 3 / 4

    def init_cache(self, z: Tensor, context: Tensor | None = None, attn_temperature: Tensor | None = None) -> Tensor:
        assert context is not None
        return context.double().view(-1, 1, 1)

    def affine(self, x: Tensor, start: int, stop: int, cache: Any) -> tuple[Tensor, Tensor]:
        log_scale, shift = super().affine(x, start, stop, None)
        steep = 40 * (x - self.centre).abs().sum(dim=2, keepdim=True).cumsum(dim=1).roll(1, dims=1)
        steep[:, 0] = 0
        steep = steep[:, start:stop].expand_as(log_scale)
        return torch.where(cache == 1, steep, log_scale), torch.where(cache == 1, -steep.exp(), shift)


def steep(rows: list[int]) -> tuple[SteepBlock, Tensor, Tensor]:
    block = SteepBlock(17, 2)
    z = normal(len(rows), 17, 2)
    context = torch.tensor(rows)
    # exp(0) z - exp(0) = centre.
    z = torch.where(context.view(-1, 1, 1) == 1, block.centre + 1, z)
    return block, z, context


@pytest.mark.parametrize("solver", PARALLEL.values(), ids=PARALLEL)
def test_sweeps_that_overflow_end_at_the_sequential_answer(solver: jf.Solver) -> None:
    block, z, context = steep([0, 1, 0, 1])
    first = block.update(z, z, 0, 17, block.init_cache(z, context))
    second = block.update(first, z, 0, 17, block.init_cache(z, context))
    assert not second[[1, 3]].isfinite().any(dim=2).all()  # plain sweeps do overflow
    answer = sequential(lambda x: block.update(x, z, 0, 17, block.init_cache(z, context)), z)
    assert torch.equal(answer[[1, 3]], block.centre.expand(2, -1, -1))

    bad, tame = [1, 3], [0, 2]
    given_up = jf.solve(block, z, solver, context).status == jf.Status.NONFINITE
    if (solver.stopping.max_sweeps or 17) < 17:
        assert given_up.tolist() == [False, True, False, True]
    solution = solve_certified(block, z, solver, context)
    assert_told_apart(solution, answer, given_up, solver)
    assert (solution.status[bad] == jf.Status.CONVERGED).all()
    # The tame rows are what they are alone.
    alone = solve_certified(block, z[tame], solver, context[tame])
    assert error(solution.x[tame], alone.x) < 1e-7
    assert torch.equal(solution.resolved_sequentially[tame], alone.resolved_sequentially)


def assert_told_apart(solution: jf.Solution, answer: Tensor, given_up: Tensor, solver: jf.Solver) -> None:
    """No row is lost, rows that are said to be converged are right, rows given up on were solved again."""
    assert solution.x.isfinite().all()
    converged = solution.status == jf.Status.CONVERGED
    assert error(solution.x[converged], answer[converged]) < 1e-7
    assert (solution.status[~converged] == jf.Status.MAX_SWEEPS).all()
    assert converged.all() or solver.stopping.atol is None
    assert solution.resolved_sequentially[given_up].all()
    assert converged[solution.resolved_sequentially].all()


def test_a_value_that_overflows_goes_back_to_the_guess() -> None:
    """The next sweep must see neither it nor the value before it."""
    seen: list[Tensor] = []

    class Spy(SteepBlock):
        def affine(self, x: Tensor, start: int, stop: int, cache: Any) -> tuple[Tensor, Tensor]:
            seen.append(x.clone())
            return super().affine(x, start, stop, cache)

    block, z, context = steep([0, 1])
    guess = z + 0.25
    jf.solve(Spy(17, 2), z, jf.Solver(jf.Whole(), Given(guess), jf.MaxSweeps(4)), context)
    assert len(seen) == 4
    assert torch.equal(seen[0], guess)
    gone_back = 0
    for sweep, (before, after) in enumerate(pairwise(seen)):
        g = block.update(before, z, 0, 17, block.init_cache(z, context))
        lost = ~g[1].isfinite().all(dim=1) & (torch.arange(17) >= sweep)
        assert torch.equal(after[1, lost], guess[1, lost])
        gone_back += int((before[1, lost] != guess[1, lost]).sum())
    assert gone_back


class PoolingBlock(jf.AffineBlock):
    """Causal attention with even weights over values e^x that overflow above 709.

    The masked weights are 0 and 0 x inf is NaN, so that one such value spoils all entries, those before it too.
    """

    def init_cache(self, z: Tensor, context: Tensor | None = None, attn_temperature: Tensor | None = None) -> None:
        return None

    def affine(self, x: Tensor, start: int, stop: int, cache: None) -> tuple[Tensor, Tensor]:
        weights = torch.ones(stop, stop - 1, dtype=x.dtype).tril(-1)
        pooled = weights @ x[:, : stop - 1].exp() / weights.sum(dim=1, keepdim=True).clamp(min=1)
        log_scale = torch.where(pooled < 3, -pooled, pooled * 0 - 3)
        return log_scale[:, start:stop], pooled[:, start:stop].tanh()


@pytest.mark.parametrize("solver", PARALLEL.values(), ids=PARALLEL)
def test_a_value_that_poisons_masked_attention_costs_a_sequential_solve(solver: jf.Solver) -> None:
    block = PoolingBlock()
    z = normal(4, 12, 1)
    z[1, 5], z[3, 10] = 1000, 1000
    answer = sequential(lambda x: block.update(x, z, 0, 12, None), z)
    assert answer.isfinite().all()
    assert block.update(z, z, 0, 12, None)[1, :5].isnan().all()  # the tokens before the value that overflows
    given_up = jf.solve(block, z, solver).status == jf.Status.NONFINITE
    if solver.partition == jf.Whole():
        assert given_up.tolist() == [False, True, False, True]
    assert_told_apart(solve_certified(block, z, solver), answer, given_up, solver)


@pytest.mark.parametrize("solver", [*PARALLEL.values(), jf.Solver(jf.Sequential())], ids=[*PARALLEL, "sequential"])
def test_an_exact_inverse_that_overflows_is_nonfinite_and_harms_no_other_row(solver: jf.Solver) -> None:
    """Row 1 of float32 values so near the largest that any scale above 1 takes them beyond it."""
    flow = to_float32(make_flow(**NVP9))
    z, labels = latents(flow, 3), torch.tensor([0, 1, 2])
    z[1] = 3.4e38
    assert not jf.solve(flow.blocks[0], z, jf.Solver(jf.Sequential()), labels).x[1].isfinite().all()
    solver = replace(solver, stopping=_at_least(solver.stopping, 1e-4))
    solution = solve_certified(flow.blocks[0], z, solver, labels)
    assert solution.status[1] == jf.Status.NONFINITE
    assert solution.residual[1] == torch.inf
    assert not solution.x[1].isfinite().all()
    assert solution.resolved_sequentially[1] == (not isinstance(solver.partition, jf.Sequential))
    others = [0, 2]
    assert (solution.status[others] != jf.Status.NONFINITE).all()
    alone = solve_certified(flow.blocks[0], z[others], solver, labels[others])
    assert error(solution.x[others], alone.x) < 1e-2
    assert torch.equal(solution.status[others], alone.status)


def _at_least(stopping: Stopping, atol: float) -> Stopping:
    return stopping if stopping.atol is None else replace(stopping, atol=max(stopping.atol, atol))


# --------------------------------------------------------------------------------------- blocks that a reader may write


class CumulativeBlock:
    """x_t = z_t + sin of the sum of the tokens before it: all that a solver needs of a block."""

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> None:
        return None

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: None) -> Tensor:
        before = torch.cat((torch.zeros_like(x[:, :1]), x.cumsum(dim=1)[:, :-1]), dim=1)
        return (z + before.sin())[:, start:stop]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_solves_a_block_of_two_methods(solver: jf.Solver) -> None:
    block = CumulativeBlock()
    z = normal(2, 20, 3)
    answer = z.clone()
    for t in range(1, 20):
        answer[:, t] = z[:, t] + answer[:, :t].sum(dim=1).sin()
    assert sweeps_needed(lambda x: block.update(x, z, 0, 20, None), z, answer, REACHED) > 5
    solution = solve_certified(block, z, solver)
    assert error(solution.x, answer) < EXACT
    assert (solution.status == jf.Status.CONVERGED).all()


def test_what_counts_as_a_block() -> None:
    flow = make_flow(**VP16)
    for block in (CumulativeBlock(), mixing().block, flow.blocks[0], _guided(flow.blocks[0], CONSTANT)):
        assert isinstance(block, jf.Block)
    assert isinstance(flow.blocks[0], jf.AffineBlock)
    assert not isinstance(torch.nn.Linear(2, 2), jf.Block)


class LazyBlock(torch.nn.Module):
    """Builds a mask at its first use and keeps it, as many modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril(-1)
        return (self.mask * self.weight) @ x.sin()

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> None:
        return None

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: None) -> Tensor:
        return (z + self(x))[:, start:stop]


def test_a_block_can_be_trained_after_it_was_solved() -> None:
    block = LazyBlock()
    assert jf.solve(block, normal(2, 6, 1), jf.Solver()).x.isfinite().all()
    block(normal(2, 6, 1)).sum().backward()
    assert block.weight.grad is not None


def test_an_affine_block_must_say_what_it_is() -> None:
    z = torch.zeros(1, 3, 1)
    with pytest.raises(TypeError, match="init_cache"):
        jf.solve(jf.AffineBlock(), z, jf.Solver())

    class NoMap(jf.AffineBlock):
        def init_cache(self, z: Tensor, context: Tensor | None = None, attn_temperature: Tensor | None = None) -> None:
            return None

    with pytest.raises(TypeError, match="affine"):
        jf.solve(NoMap(), z, jf.Solver())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: jf.Segments(0), "0"),
        (lambda: jf.Segments(2.5), "2.5"),  # type: ignore[arg-type]
        (lambda: jf.Window(0), "0"),
        (lambda: jf.Window(-3), "-3"),
        (lambda: jf.Tolerance(-1e-3), "-0.001"),
        (lambda: jf.Tolerance(math.nan), "nan"),
        (lambda: jf.Tolerance(math.inf), "inf"),
        (lambda: jf.MaxSweeps(0), "0"),
        (lambda: jf.MaxSweeps(1.5), "1.5"),  # type: ignore[arg-type]
        (lambda: jf.Tolerance(0.1) | jf.Tolerance(0.2), "0.2"),
        (lambda: jf.MaxSweeps(3) | jf.MaxSweeps(4), "4"),
        (Stopping, "tolerance"),
    ],
)
def test_pieces_refuse_what_makes_no_sense(build: Callable[[], Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        build()


def test_more_sweeps_than_any_need_are_no_limit() -> None:
    problem = mixing(17)
    solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-12) | jf.MaxSweeps(10**30))
    assert error(jf.solve(problem.block, problem.z, solver).x, problem.answer) < EXACT


def test_stopping_by_either() -> None:
    assert jf.Tolerance(0.1) | jf.MaxSweeps(3) == jf.MaxSweeps(3) | jf.Tolerance(0.1) == Stopping(0.1, 3)


def test_solve_refuses_what_does_not_fit() -> None:
    problem = problems("vp 16x1")[0]
    with pytest.raises(ValueError, match=r"17.*16"):
        jf.solve(problem.block, problem.z, jf.Solver(jf.Segments(17)))
    with pytest.raises(ValueError, match=r"\(3, 16\)"):
        jf.solve(problem.block, problem.z[..., 0], jf.Solver())
    with pytest.raises(ValueError, match="finite"):
        jf.solve(problem.block, problem.z * math.inf, jf.Solver())


def test_every_status_says_what_it_means() -> None:
    messages = {status.message for status in jf.Status}
    assert len(messages) == len(jf.Status)
