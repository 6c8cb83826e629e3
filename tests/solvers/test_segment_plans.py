"""Sweep counts per segment, and the calibrated guess, in the solver: against loops of the oracle without a cache.

All flows are float64. "Exact" is within 1e-10 of the largest value (of 1 where that is smaller): rounding, as in
`test_solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Guide, Oracle, jacobi, sequential, sweeps_needed, window_jacobi
from problems import REACHED, BlockProblem, Ledger, MixingBlock, latents, make_flow, to_float32
from torch import Tensor

import jacobiflow as jf
from jacobiflow.guidance import guided
from jacobiflow.solvers import Given, Stopping, solve_certified

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
plans = settings(max_examples=40, deadline=None, derandomize=True)

NVP25 = {"image_size": 10, "patch_size": 2}
VP16 = {"image_size": 4, "patch_size": 1, "nvp": False}
NVP9 = {"image_size": 6, "patch_size": 2, "num_classes": 3}
ANNEALED = Guide(1.0, annealed=True, on="both", temperature=0.7)
SETUPS: dict[str, tuple[dict[str, Any], Guide | None]] = {
    "nvp 25x4": (NVP25, None),
    "vp 16x1": (VP16, None),
    "nvp 9x4, classes, annealed guidance": (NVP9, ANNEALED),
}


@cache
def problems(setup: str) -> tuple[BlockProblem, ...]:
    """Both blocks of a setup, each at three samples; either permutation."""
    config, guide = SETUPS[setup]
    flow = make_flow(**config)
    oracle = Oracle(flow)
    labels = torch.tensor([0, flow.config.num_classes - 1, -1]) if flow.config.num_classes else None
    found = []
    for i, block in enumerate(flow.blocks):
        z = latents(flow, 3, seed=i)
        g = partial(_oracle_g, oracle, i, z, labels, guide)
        guidance = jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature) if guide else None
        found.append(BlockProblem(guided(block, guidance), g, z, labels, sequential(g, z)))
    return tuple(found)


def _oracle_g(oracle: Oracle, i: int, z: Tensor, labels: Tensor | None, guide: Guide | None, x: Tensor) -> Tensor:
    return oracle.g(i, x, z, labels, guide)


@cache
def mixing(length: int = 17) -> BlockProblem:
    """A block without attention whose first entry is learned: its token 0 is not z_1."""
    block, z = MixingBlock(length, 2), normal(3, length, 2, seed=1)
    g = partial(block.g, z=z)
    return BlockProblem(block, g, z, None, sequential(g, z))


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(x: Tensor, answer: Tensor) -> float:
    """Largest difference, relative to the largest value of the answer (to 1 where that is smaller)."""
    assert x.shape == answer.shape
    return float((x - answer).abs().max() / answer.abs().max().clamp(min=1)) if x.numel() else 0.0


def bounds(length: int, count: int) -> list[tuple[int, int]]:
    """Start and end of each segment."""
    return list(pairwise(math.floor(i * length / count) for i in range(count + 1)))


def by_segment(g: Callable[[Tensor], Tensor], guess: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Plain sweeps of one segment after another, segment s counts[s] times, everything computed from present values.

    Also, per sample, the largest last move of a token that its segment's sweeps do not make exact.
    """
    x, left = guess.double().clone(), torch.zeros(len(guess), dtype=torch.float64)
    for (start, end), count in zip(bounds(x.shape[1], len(counts)), counts, strict=True):
        for _ in range(count):
            new = g(x)[:, start:end]
            move = (new - x[:, start:end]).abs()
            x[:, start:end] = new
        left = torch.maximum(left, torch.cat((move[:, count:], move[:, :1] * 0), dim=1).amax(dim=(1, 2)))
    return x, left


def to_tolerance(
    g: Callable[[Tensor], Tensor], guess: Tensor, counts: Sequence[int], atol: float
) -> tuple[Tensor, list[int]]:
    """As `by_segment`, but a segment also ends where all samples have settled; and the sweeps of each segment.

    A sweep settles the leading tokens that it changes by at most `atol`; the front passes those that all samples have
    settled, and one more. Later sweeps read a token passed so as the sweep that settled it did, any other as it is.
    """
    x, read, used = guess.double().clone(), guess.double().clone(), []
    known = 0
    for (start, end), count in zip(bounds(x.shape[1], len(counts)), counts, strict=True):
        front, done = start, 0
        while front < end and done < count:
            read[:, max(known - 1, 0) :] = x[:, max(known - 1, 0) :]
            new = g(read)[:, front:end]
            quiet = ((new - x[:, front:end]).abs().amax(dim=2) <= atol).cumprod(dim=1).sum(dim=1)
            x[:, front:end] = new
            front = known = min(front + (int(quiet.min()) if end - front > 1 else 0) + 1, end)
            done += 1
        used.append(done)
    return x, used


def solver_of(counts: Sequence[int], guess: Any = None, atol: float | None = None) -> jf.Solver:
    return jf.Solver(jf.Segments(len(counts)), guess or jf.Latent(), Stopping(atol, tuple(counts)))


def sweeps_of(ledger: Ledger, length: int, count: int) -> list[int]:
    """How many calls ended where each segment ends."""
    return [sum(stop == end for _, stop in ledger.calls) for _, end in bounds(length, count)]


# ---------------------------------------------------------------------------------------------- sweeps for each segment

COUNTS: list[tuple[int, ...]] = [
    (5, 3, 2),
    (1, 1, 1),
    (1, 4, 1),
    (3, 1, 40),
    (40, 1, 2),
    (7,),
    (2, 6),
    (1, 2, 3, 4, 3, 2, 1),
    (2, 1, 3, 1, 1, 2),
    (1,) * 4 + (3,) * 5,
]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("setup", [*SETUPS, "mixing"])
def test_a_segment_gets_its_own_number_of_sweeps(setup: str, counts: tuple[int, ...]) -> None:
    """As many network calls, none on stale keys, and the iterates of a loop that keeps no keys at all.

    A segment of n tokens is exact after n sweeps and needs no more.
    """
    for problem in [mixing()] if setup == "mixing" else problems(setup):
        for guess in (jf.Latent(), jf.Zeros()):
            ledger = Ledger(problem.block)
            solution = jf.solve(ledger, problem.z, solver_of(counts, guess), problem.labels)
            lengths = [end - start for start, end in bounds(problem.length, len(counts))]
            expected = [min(pair) for pair in zip(counts, lengths, strict=True)]
            assert sweeps_of(ledger, problem.length, len(counts)) == expected
            assert len(ledger.calls) == solution.sweeps == solution.network_calls == sum(expected)
            assert solution.token_evaluations == 3 * sum(stop - start for start, stop in ledger.calls)
            reference, left = by_segment(problem.g, guess(problem.z), counts)
            assert error(solution.x, reference) < EXACT
            assert torch.allclose(solution.residual, left, rtol=1e-8, atol=EXACT)
            short = any(count < length for count, length in zip(counts, lengths, strict=True))
            assert (solution.status == (jf.Status.MAX_SWEEPS if short else jf.Status.CONVERGED)).all()


@given(length=st.integers(1, 20), data=st.data())
@plans
def test_any_counts_of_any_segments(length: int, data: st.DataObject) -> None:
    """Uneven segments and segments of one token among them."""
    problem = mixing(length)
    counts = data.draw(st.lists(st.integers(1, length + 2), min_size=1, max_size=length))
    ledger = Ledger(problem.block)
    solution = jf.solve(ledger, problem.z, solver_of(counts))
    lengths = [end - start for start, end in bounds(length, len(counts))]
    assert sweeps_of(ledger, length, len(counts)) == [min(pair) for pair in zip(counts, lengths, strict=True)]
    assert error(solution.x, by_segment(problem.g, problem.z, counts)[0]) < EXACT


@given(setup=st.sampled_from(list(SETUPS)), data=st.data(), atol=st.none() | st.sampled_from([0.0, 1e-8, 1e-3, 0.1]))
@plans
def test_no_counts_rely_on_stale_or_missing_keys(setup: str, data: st.DataObject, atol: float | None) -> None:
    problem = problems(setup)[data.draw(st.integers(0, 1))]
    counts = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=problem.length))
    ledger = Ledger(problem.block, slack=atol or 0.0)
    jf.solve(ledger, problem.z, solver_of(counts, atol=atol), problem.labels)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12, 25])
def test_as_many_sweeps_as_a_segment_has_tokens_are_exact(count: int) -> None:
    """Counts are each segment's own length, one more, or far more."""
    for problem in problems("nvp 25x4"):
        lengths = [end - start for start, end in bounds(25, count)]
        for counts in (lengths, [n + 1 for n in lengths], [n * 10**30 for n in lengths]):
            solution = jf.solve(problem.block, problem.z, solver_of(counts))
            assert error(solution.x, problem.answer) < EXACT
            assert (solution.status == jf.Status.CONVERGED).all()
            assert (solution.residual == 0).all()
            assert solution.sweeps == 25


@pytest.mark.parametrize("short", range(4))
def test_segments_before_the_first_one_that_is_cut_short_are_exact(short: int) -> None:
    for problem in problems("nvp 25x4"):
        counts = [2 if s == short else 25 for s in range(4)]
        start, end = bounds(25, 4)[short]
        solution = jf.solve(problem.block, problem.z, solver_of(counts))
        assert error(solution.x[:, : start + 2], problem.answer[:, : start + 2]) < EXACT
        assert error(solution.x[:, :end], problem.answer[:, :end]) > REACHED
        assert (solution.status == jf.Status.MAX_SWEEPS).all()


def test_one_token_in_each_segment_is_the_sequential_loop() -> None:
    for setup in SETUPS:
        for problem in problems(setup):
            one = jf.solve(problem.block, problem.z, jf.Solver(jf.Sequential()), problem.labels)
            counts = [1 + t % 3 for t in range(problem.length)]
            many = jf.solve(problem.block, problem.z, solver_of(counts), problem.labels)
            assert torch.equal(one.x, many.x)
            assert many.sweeps == problem.length


@pytest.mark.parametrize("atol", [None, 1e-4])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_equal_counts_are_one_count(count: int, atol: float | None) -> None:
    for problem in problems("nvp 25x4"):
        for sweeps in (1, 3, 30):
            each = jf.solve(problem.block, problem.z, solver_of([sweeps] * count, atol=atol))
            same = jf.solve(problem.block, problem.z, jf.Solver(jf.Segments(count), stopping=Stopping(atol, sweeps)))
            assert torch.equal(each.x, same.x)
            assert torch.equal(each.residual, same.residual)
            assert torch.equal(each.status, same.status)
            assert (each.sweeps, each.token_evaluations) == (same.sweeps, same.token_evaluations)


# ---------------------------------------------------------------------------------------------------- with a tolerance


@pytest.mark.parametrize("atol", [1e-1, 1e-3, 1e-7])
@pytest.mark.parametrize("counts", [(6, 2, 4), (1, 30, 2), (30, 30, 30), (4, 1, 1, 5, 2, 30)], ids=str)
@pytest.mark.parametrize("setup", SETUPS)
def test_a_tolerance_ends_a_segment_before_its_count(setup: str, counts: tuple[int, ...], atol: float) -> None:
    for problem in problems(setup):
        ledger = Ledger(problem.block, slack=atol)
        solution = jf.solve(ledger, problem.z, solver_of(counts, atol=atol), problem.labels)
        reference, used = to_tolerance(problem.g, problem.z, counts, atol)
        assert sweeps_of(ledger, problem.length, len(counts)) == used
        assert all(sweeps <= count for sweeps, count in zip(used, counts, strict=True))
        assert error(solution.x, reference) < EXACT
        converged = solution.status == jf.Status.CONVERGED
        assert (solution.residual[converged] <= atol).all()


def test_counts_that_no_segment_uses_up_change_nothing() -> None:
    for problem in problems("nvp 25x4"):
        free = jf.solve(problem.block, problem.z, jf.Solver(jf.Segments(4), stopping=jf.Tolerance(1e-5)))
        solution = jf.solve(problem.block, problem.z, solver_of((30, 20, 10, 25), atol=1e-5))
        assert torch.equal(solution.x, free.x)
        assert solution.sweeps == free.sweeps < 25
        assert (solution.status == jf.Status.CONVERGED).all()


@pytest.mark.parametrize("certificate", [True, False])
def test_a_sample_that_one_segment_keeps_from_its_tolerance_is_solved_again(certificate: bool) -> None:
    for setup in ("nvp 25x4", "nvp 9x4, classes, annealed guidance"):
        for problem in problems(setup):
            solver = solver_of((30, 1, 30), atol=1e-9)
            assert (jf.solve(problem.block, problem.z, solver, problem.labels).status == jf.Status.MAX_SWEEPS).all()
            solution = solve_certified(problem.block, problem.z, solver, problem.labels, certificate)
            assert solution.resolved_sequentially.all()
            assert (solution.status == jf.Status.CONVERGED).all()
            assert error(solution.x, problem.answer) < EXACT


def test_only_the_samples_that_a_segment_keeps_from_their_tolerance_are_solved_again() -> None:
    """Row 1 starts at its answer."""
    problem = problems("nvp 25x4")[0]
    start = problem.z.clone()
    start[1] = problem.answer[1]
    solution = solve_certified(problem.block, problem.z, solver_of((30, 2, 30), Given(start), atol=1e-9))
    assert solution.resolved_sequentially.tolist() == [True, False, True]
    assert (solution.status == jf.Status.CONVERGED).all()
    assert error(solution.x, problem.answer) < 1e-6


def test_counts_alone_are_a_legitimate_end_and_their_certificate_is_the_residual() -> None:
    for problem in problems("nvp 25x4"):
        solution = solve_certified(problem.block, problem.z, solver_of((4, 2, 1)))
        assert (solution.status == jf.Status.MAX_SWEEPS).all()
        assert not solution.resolved_sequentially.any()
        assert error(solution.x, by_segment(problem.g, problem.z, (4, 2, 1))[0]) < EXACT
        residual = (problem.g(solution.x) - solution.x).abs().amax(dim=(1, 2))
        assert torch.allclose(solution.residual, residual, rtol=1e-10)


# ------------------------------------------------------------------------------------------ samples, inputs, bad input


@pytest.mark.parametrize(
    ("atol", "allowed"),
    [(None, EXACT), (1e-9, 1e-6)],  # where the batch shares a front, the tolerance as the recurrence amplifies it
)
def test_a_sample_does_not_depend_on_the_batch(atol: float | None, allowed: float) -> None:
    for setup in SETUPS:
        for problem in problems(setup):
            solver = solver_of((3, 1, 2) if atol is None else (30, 30, 30), atol=atol)
            together = solve_certified(problem.block, problem.z, solver, problem.labels).x
            for rows in ([0], [2, 1]):
                labels = None if problem.labels is None else problem.labels[rows]
                alone = solve_certified(problem.block, problem.z[rows], solver, labels).x
                assert error(alone, together[rows]) <= allowed


def test_inputs_stay_and_results_repeat() -> None:
    problem = problems("nvp 9x4, classes, annealed guidance")[1]
    z, labels, start = problem.z.clone(), problem.labels, normal(*problem.z.shape)
    kept = z.clone(), start.clone()
    solver = solver_of((4, 1, 2), Given(start))
    first, again = (jf.solve(problem.block, z, solver, labels) for _ in range(2))
    assert torch.equal(first.x, again.x)
    assert first.x.data_ptr() not in (z.data_ptr(), start.data_ptr())
    assert torch.equal(z, kept[0])
    assert torch.equal(start, kept[1])


def test_a_flow_is_sampled_with_counts_per_segment() -> None:
    """Each block with its own plan, through `decode`; 25 tokens."""
    flow, plan = make_flow(**NVP25), [(5, 3, 2), (2, 1, 4, 1)]
    z = latents(flow, 3, seed=2)
    out = jf.decode(flow, z, strategy=jf.Strategy(tuple(solver_of(counts) for counts in plan)))
    reference = Oracle(flow)
    x = z * reference.var.sqrt()
    for i in (1, 0):
        at = reference.flip(i, x)
        x = reference.flip(i, by_segment(partial(_oracle_g, reference, i, at, None, None), at, plan[i])[0])
    assert error(out.images, reference.images(x)) < EXACT
    assert [block.sweeps for block in out.stats] == [10, 8]
    assert (out.status == jf.Status.MAX_SWEEPS).all()


WRONG_PLANS: dict[str, tuple[Callable[[], Any], str]] = {
    "too few": (lambda: solver_with(jf.Segments(3), (5, 3)), r"2.*Segments\(count=3\)"),
    "too many": (lambda: solver_with(jf.Segments(3), (5, 3, 2, 1)), r"4.*Segments\(count=3\)"),
    "whole": (lambda: solver_with(jf.Whole(), (5,)), "1.*Whole"),
    "sequential": (lambda: solver_with(jf.Sequential(), (5, 3)), "2.*Sequential"),
    "window": (lambda: solver_with(jf.Window(3), (5, 3, 2)), r"3.*Window\(size=3\)"),
    "the default partition": (lambda: jf.Solver(stopping=jf.MaxSweeps((5, 3, 2))), "3.*Whole"),
    "with a tolerance": (lambda: jf.Solver(jf.Segments(2), stopping=Stopping(1e-3, (5,))), "1.*Segments"),
    "replaced": (lambda: replace(solver_with(jf.Segments(3), (5, 3, 2)), partition=jf.Segments(2)), "3.*Segments"),
    "none": (lambda: jf.MaxSweeps(()), "sweeps"),
    "zero": (lambda: jf.MaxSweeps((5, 0, 2)), "0"),
    "negative": (lambda: jf.MaxSweeps((5, -1, 2)), "-1"),
    "fraction": (lambda: jf.MaxSweeps((5, 1.5, 2)), r"1\.5"),  # type: ignore[arg-type]
    "nested": (lambda: jf.MaxSweeps(((5, 3), 2)), "sweeps"),  # type: ignore[arg-type]
    "missing": (lambda: jf.MaxSweeps((5, None)), "None"),  # type: ignore[arg-type]
    "text": (lambda: jf.MaxSweeps("53"), "5"),  # type: ignore[arg-type]
    "tensor": (lambda: jf.MaxSweeps(torch.tensor([5, 3])), "sweeps"),  # type: ignore[arg-type]
    "twice": (lambda: jf.MaxSweeps((5, 3)) | jf.MaxSweeps(4), "both"),
}


def solver_with(partition: Any, counts: tuple[int, ...]) -> jf.Solver:
    return jf.Solver(partition, stopping=jf.MaxSweeps(counts))


@pytest.mark.parametrize(("build", "names"), WRONG_PLANS.values(), ids=WRONG_PLANS)
def test_counts_that_fit_no_segments_are_refused(build: Callable[[], Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        build()


def test_counts_are_values() -> None:
    assert jf.MaxSweeps([5, 3, 2]) == jf.MaxSweeps((5, 3, 2)) == Stopping(None, (5, 3, 2))
    assert jf.MaxSweeps(range(1, 4)).max_sweeps == (1, 2, 3)
    assert hash(jf.MaxSweeps([5, 3, 2])) == hash(jf.MaxSweeps((5, 3, 2)))
    assert jf.MaxSweeps((5, 3)) != jf.MaxSweeps((3, 5))
    assert jf.MaxSweeps((3,)) != jf.MaxSweeps(3)
    assert jf.Tolerance(0.1) | jf.MaxSweeps((5, 3)) == jf.MaxSweeps((5, 3)) | jf.Tolerance(0.1) == Stopping(0.1, (5, 3))


def test_more_counts_than_tokens_are_refused_with_their_segments() -> None:
    problem = problems("vp 16x1")[0]
    with pytest.raises(ValueError, match=r"17.*16"):
        jf.solve(problem.block, problem.z, solver_of([1] * 17))


# ---------------------------------------------------------------------------------------------- the calibrated guess


def mean_affine(problem: BlockProblem, seed: int = 3) -> jf.MeanAffine:
    shape = problem.z.shape[1:]
    return jf.MeanAffine(0.3 * normal(*shape, seed=seed), 0.5 * normal(*shape, seed=seed + 1))


def start_of(guess: jf.MeanAffine, z: Tensor) -> Tensor:
    return torch.exp(guess.log_scale.double()) * z + guess.shift.double()


@pytest.mark.parametrize("kept_in", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_guess_is_affine_in_z_and_of_its_dtype(dtype: torch.dtype, kept_in: torch.dtype) -> None:
    log_scale, shift, z = normal(6, 3).to(kept_in), normal(6, 3, seed=1).to(kept_in), normal(4, 6, 3, seed=2).to(dtype)
    kept = log_scale.clone(), shift.clone(), z.clone()
    x = jf.MeanAffine(log_scale, shift)(z)
    assert x.dtype == dtype
    assert x.shape == z.shape
    precise = log_scale.double().exp() * z.double() + shift.double()
    assert torch.allclose(x.double(), precise, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((log_scale, shift, z), kept, strict=True))
    assert x.data_ptr() not in (log_scale.data_ptr(), shift.data_ptr(), z.data_ptr())
    assert torch.equal(jf.MeanAffine(log_scale, shift)(z[1:2]), x[1:2])  # a sample alone


def test_zero_parameters_are_the_latent() -> None:
    z = normal(2, 5, 3)
    assert torch.equal(jf.MeanAffine(torch.zeros(5, 3), torch.zeros(5, 3))(z), z)


@pytest.mark.parametrize(
    ("log_scale", "shift"),
    [
        ((5, 3), (5, 2)),
        ((5, 3), (3, 5)),
        ((5,), (5,)),
        ((), ()),
        ((1, 5, 3), (1, 5, 3)),
        ((5, 3), (1, 3)),
        ((5, 3), ()),
    ],
)
def test_parameters_of_other_shapes_are_refused(log_scale: tuple[int, ...], shift: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"MeanAffine.*tokens, channels"):
        jf.MeanAffine(torch.zeros(log_scale), torch.zeros(shift))


@pytest.mark.parametrize("shape", [(15, 1), (17, 1), (16, 2), (1, 1), (1, 16)])
def test_a_guess_for_another_flow_is_refused(shape: tuple[int, int]) -> None:
    """Shapes that would broadcast too."""
    problem = problems("vp 16x1")[0]
    guess = jf.MeanAffine(torch.zeros(shape), torch.zeros(shape))
    for partition in (jf.Sequential(), jf.Whole(), jf.Segments(3), jf.Window(4)):
        with pytest.raises(ValueError, match=r"MeanAffine.*\(16, 1\)"):
            jf.solve(problem.block, problem.z, jf.Solver(partition, guess))
    with pytest.raises(ValueError, match="MeanAffine"):
        jf.decode(
            make_flow(**VP16), latents(make_flow(**VP16), 2), strategy=jf.Strategy.uniform(jf.Solver(guess=guess), 2)
        )


def test_guesses_are_equal_where_their_values_are() -> None:
    log_scale, shift = normal(5, 3), normal(5, 3, seed=1)
    guess = jf.MeanAffine(log_scale, shift)
    same = jf.MeanAffine(log_scale.clone(), shift.clone())
    assert guess == same
    assert hash(guess) == hash(same)
    assert len({guess, same}) == 1
    for other in (
        jf.MeanAffine(log_scale, shift + 1e-12),
        jf.MeanAffine(log_scale + 1e-12, shift),
        jf.MeanAffine(shift, log_scale),
        jf.MeanAffine(log_scale[:4], shift[:4]),
        jf.MeanAffine(log_scale.reshape(3, 5), shift.reshape(3, 5)),
    ):
        assert guess != other
    assert guess != jf.Latent()
    assert jf.Zeros() != guess
    assert guess != (log_scale, shift)
    assert jf.Solver(guess=guess) == jf.Solver(guess=same)
    assert jf.Solver(guess=guess) != jf.Solver()
    assert hash(jf.Solver(guess=guess)) == hash(jf.Solver(guess=same))
    negative = jf.MeanAffine(torch.zeros(5, 3), -torch.zeros(5, 3))
    positive = jf.MeanAffine(torch.zeros(5, 3), torch.zeros(5, 3))
    assert negative == positive
    assert hash(negative) == hash(positive)


def test_guesses_of_different_dtypes_compare_without_failing() -> None:
    single, double = (
        jf.MeanAffine(torch.ones(2, 3, dtype=d), torch.ones(2, 3, dtype=d)) for d in (torch.float32, torch.float64)
    )
    assert (single == double) in (True, False)
    assert single != double or hash(single) == hash(double)


def test_a_guess_is_short_when_printed() -> None:
    """A line, with its sizes, not with its thousands of numbers."""
    text = repr(jf.MeanAffine(torch.zeros(1024, 12), torch.zeros(1024, 12)))
    assert "\n" not in text
    assert len(text) < 100
    assert "1024" in text
    assert "12" in text


PLANS: dict[str, jf.Solver] = {
    "whole": jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-9)),
    "segments": jf.Solver(jf.Segments(3), stopping=jf.Tolerance(1e-9)),
    "window": jf.Solver(jf.Window(5), stopping=jf.Tolerance(1e-9)),
    "counts": solver_of((30, 30, 30), atol=1e-9),
    "sequential": jf.Solver(jf.Sequential(), stopping=jf.Tolerance(1e-9)),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("setup", [*SETUPS, "mixing"])
def test_the_solution_is_that_from_the_latent(setup: str, plan: jf.Solver) -> None:
    """To the tolerance, which the recurrence amplifies less than 1e3 times in these flows; no key is stale."""
    for problem in [mixing()] if setup == "mixing" else problems(setup):
        ledger = Ledger(problem.block, slack=1e-9)
        solution = jf.solve(ledger, problem.z, replace(plan, guess=mean_affine(problem)), problem.labels)
        latent = jf.solve(problem.block, problem.z, plan, problem.labels)
        assert (solution.status == jf.Status.CONVERGED).all()
        assert error(solution.x, problem.answer) < 1e-6
        assert error(solution.x, latent.x) < 1e-6
        certified = solve_certified(problem.block, problem.z, replace(plan, guess=mean_affine(problem)), problem.labels)
        assert (certified.residual <= 1e-9).all()


@pytest.mark.parametrize("sweeps", [1, 2, 5])
@pytest.mark.parametrize("setup", [*SETUPS, "mixing"])
def test_sweeps_start_at_the_guess(setup: str, sweeps: int) -> None:
    """And make one more token exact each."""
    for problem in [mixing()] if setup == "mixing" else problems(setup):
        guess = mean_affine(problem)
        start = start_of(guess, problem.z)
        whole = jf.solve(problem.block, problem.z, jf.Solver(jf.Whole(), guess, jf.MaxSweeps(sweeps)), problem.labels)
        assert error(whole.x, jacobi(problem.g, start, sweeps)) < EXACT
        assert error(whole.x[:, :sweeps], problem.answer[:, :sweeps]) < EXACT
        assert error(whole.x, problem.answer) > REACHED
        window = jf.solve(
            problem.block, problem.z, jf.Solver(jf.Window(4), guess, jf.MaxSweeps(sweeps)), problem.labels
        )
        assert error(window.x, window_jacobi(problem.g, start, 4, sweeps)) < EXACT
        counts = (sweeps, 1, 2)
        by_counts = jf.solve(problem.block, problem.z, solver_of(counts, guess), problem.labels)
        assert error(by_counts.x, by_segment(problem.g, start, counts)[0]) < EXACT


def test_a_guess_near_the_answer_saves_sweeps() -> None:
    """Scale and shift that give row 0 its answer: a sweep to see it; and fewer sweeps than from z beside it."""
    for problem in problems("nvp 25x4"):
        answer = jf.MeanAffine(torch.full((25, 4), -800.0), problem.answer[0])
        solver = jf.Solver(jf.Whole(), answer, jf.Tolerance(1e-10))
        assert jf.solve(problem.block, problem.z[:1], solver).sweeps == 1
        near = jf.Solver(jf.Whole(), jf.MeanAffine(answer.log_scale, problem.answer[0] + 1e-4), jf.Tolerance(1e-5))
        far = replace(near, guess=jf.Latent())
        assert jf.solve(problem.block, problem.z[:1], near).sweeps < jf.solve(problem.block, problem.z[:1], far).sweeps


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_guess_that_overflows_still_ends_at_the_answer(plan: jf.Solver) -> None:
    """exp(800) is infinite; at one position, or everywhere."""
    for problem in problems("nvp 25x4"):
        for where in (slice(7, 8), slice(None)):
            guess = mean_affine(problem)
            guess.log_scale[where] = 800
            assert not guess(problem.z).isfinite().all()
            solution = solve_certified(problem.block, problem.z, replace(plan, guess=guess))
            assert (solution.status == jf.Status.CONVERGED).all()
            assert error(solution.x, problem.answer) < 1e-6


def test_a_float32_flow_takes_a_float64_guess_and_the_other_way_round() -> None:
    flow = make_flow(**VP16)
    z = latents(flow, 2)
    guess = jf.MeanAffine(0.3 * normal(16, 1), normal(16, 1, seed=1))
    single = jf.MeanAffine(guess.log_scale.float(), guess.shift.float())
    solver = jf.Solver(jf.Segments(3), guess, jf.Tolerance(1e-4))
    out = jf.solve(to_float32(flow).blocks[0], z.float(), solver)
    assert out.x.dtype == torch.float32
    other = jf.solve(flow.blocks[0], z, replace(solver, guess=single))
    assert other.x.dtype == torch.float64
    assert error(out.x.double(), other.x) < 1e-2


def test_a_calibrated_guess_is_in_the_causal_order_of_its_block() -> None:
    """Where a block's parameters depend on the position alone, it is the answer; odd blocks read in reverse."""
    flow = jf.TarFlow(make_flow(**NVP25).config).double().eval()
    with torch.no_grad():
        for block in flow.blocks:
            for layer in block.attn_blocks:
                layer.attention.proj.weight.zero_()
            block.proj_in.weight.zero_()
            block.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
            block.proj_out.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    z = latents(flow, 4)
    images = jf.decode(flow, z, strategy="sequential").images
    report = jf.calibrate(flow, images, traced=2, progress=False)
    x = z * flow.var.sqrt()
    for i in (1, 0):
        block = flow.blocks[i]
        at = block.permutation(x)
        answer = jf.solve(block, at, jf.Solver(jf.Sequential())).x
        assert error(answer, at) > 0.1
        assert error(report.mean_affine[i](at), answer) < 1e-5  # its values are float32
        x = block.permutation(answer)


def test_sweeps_needed_of_the_oracle_and_of_the_solver_agree_from_the_guess() -> None:
    """Fewer, or more, sweeps than from z: whatever the guess, the count is the same in both."""
    for problem in problems("nvp 25x4"):
        guess = mean_affine(problem)
        needed = sweeps_needed(problem.g, start_of(guess, problem.z), problem.answer, 1e-3)
        for sweeps, there in ((needed, True), (needed - 1, False)):
            x = jf.solve(problem.block, problem.z, jf.Solver(jf.Whole(), guess, jf.MaxSweeps(sweeps))).x
            assert bool(((x - problem.answer).abs() <= 1e-3).all()) == there
