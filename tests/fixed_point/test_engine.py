"""The loop of all solvers, against the oracle's sweeps without a cache and its token-by-token answers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from tests.helpers.oracle import Swept, swept
from tests.helpers.problems import BlockProblem
from tests.helpers.solver_problems import (
    FLOWS,
    OVERFLOWING,
    Watched,
    WatchedFronts,
    attempt,
    echo,
    echoes,
    error,
    flow_problem,
    normal,
    steep,
    steep_problem,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


@dataclass(frozen=True)
class Half(jf.SlidingRun):
    """A window over half of the sequence, from outside the package."""

    def run_size(self, num_tokens: int) -> int:
        return num_tokens // 2


@dataclass(frozen=True)
class Alternating(jf.Partition):
    """8 tokens from even fronts and 3 from odd ones: a token is swept in sweeps that are not in a row."""

    def stop(self, front: int, num_tokens: int) -> int:
        return min(front + (3 if front % 2 else 8), num_tokens)


def expected(
    problem: BlockProblem, solver: jf.Solver, start: Tensor, tolerance: float | None, keys: bool = True
) -> Swept:
    """The oracle's sweeps of a batch with one front."""
    length, rule, limits = problem.length, solver.stopping, None
    if isinstance(rule.max_sweeps, tuple):
        count = len(rule.max_sweeps)
        limits = [rule.max_sweeps[((t + 1) * count - 1) // length] for t in range(length)]
    elif rule.max_sweeps is not None:
        limits = [rule.max_sweeps] * length
    atol = None if tolerance is None else solver.tolerance_factor * tolerance
    return swept(
        problem.g, start, partial(solver.partition.stop, num_tokens=length), atol=atol, limits=limits, keys=keys,
        ebound=-1 if rule.ebound is None else rule.ebound,
    )  # fmt: skip


def check(problem: BlockProblem, solver: jf.Solver, start: Tensor, tolerance: float | None) -> None:
    """Tokens, counts, residuals and statuses of a batch with one front are the oracle's.

    As many sweeps as there are tokens end at the exact answer (Proposition 1).
    """
    want, batch = expected(problem, solver, start, tolerance), len(problem.z)
    solution = attempt(problem.block, problem.z, solver, problem.labels, tolerance=tolerance)
    assert error(solution.x, want.x) < EXACT
    assert solution.sweeps == solution.network_calls == want.sweeps <= problem.length
    assert solution.token_evaluations == want.evaluations
    assert solution.sample_sweeps.tolist() == [want.sweeps] * batch
    torch.testing.assert_close(solution.residual, want.residual, rtol=1e-6, atol=EXACT)
    assert solution.status.tolist() == [
        int(jf.Status.MAX_SWEEPS if missed else jf.Status.CONVERGED) for missed in want.missed
    ]
    one_by_one = all(b - a == 1 for a, b in pairwise(want.fronts)) and want.evaluations == batch * problem.length
    assert solution.exact.tolist() == [one_by_one] * batch
    assert not solution.used_fallback.any()
    if tolerance is solver.stopping.ebound is None and not want.missed.any():
        assert error(solution.x, problem.answer) < EXACT


LENGTH = 17
STARTS: list[tuple[jf.Guess, Callable[[Tensor], Tensor]]] = [
    (jf.Latent(), lambda z: z), (jf.Zeros(), lambda z: torch.cat((z[:, :1], 0 * z[:, 1:]), dim=1)),
]  # fmt: skip
PARTITIONS = [
    jf.Sequential(), jf.Whole(), jf.Segments(1), jf.Segments(5), jf.Segments(17), jf.Window(1), jf.Window(4),
    jf.Window(100), Half(), Alternating(),
]  # fmt: skip
RULES = [
    (1e-2, jf.Stopping()), (1e-6, jf.Stopping()), (None, jf.Stopping(1)), (None, jf.Stopping(3)),
    (None, jf.Stopping(10**30)), (None, jf.Stopping(ebound=1e-3)), (None, jf.Stopping(3, 2e-2)),
    (1e-2, jf.Stopping(2)), (1e-3, jf.Stopping(ebound=1e-2)),
]  # fmt: skip


@pytest.mark.parametrize(("tolerance", "stopping"), RULES, ids=str)
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_sweeps_are_those_of_the_oracle(
    partition: jf.Partition, tolerance: float | None, stopping: jf.Stopping
) -> None:
    """By a block that reads the keys it was fed; none is staler than the rule allows. The first token is learned."""
    for guess, start in STARTS:
        problem = echoes(False, 3, LENGTH, slack=math.inf if stopping.ebound else tolerance or 0.0)
        check(problem, jf.Solver(partition, guess, stopping), start(problem.z), tolerance)
        assert len({samples for _, _, samples in problem.block.calls}) == 1


@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_a_segment_has_its_own_number_of_sweeps(tolerance: float | None) -> None:
    for counts in ((5, 3, 2), (1, 4, 1), (3, 1, 40), (7,), (1, 2, 3, 4, 3, 2, 1), (10**30, 1, 2), (1,) * 9 + (3,) * 8):
        problem = echoes(False, 3, LENGTH, slack=tolerance or 0.0)
        check(problem, jf.Solver(jf.Segments(len(counts)), stopping=jf.Stopping(counts)), problem.z, tolerance)


FLOW_SOLVERS = [
    jf.Solver(jf.Sequential()), jf.Solver(jf.Whole(), jf.Zeros(), tolerance_factor=1e-3),
    jf.Solver(jf.Segments(4)), jf.Solver(jf.Segments(4), jf.Zeros(), jf.Stopping(2)), jf.Solver(jf.Window(7)),
    jf.Solver(jf.Window(5), stopping=jf.Stopping(2)), jf.Solver(jf.Segments(3), stopping=jf.Stopping((3, 1, 2))),
    jf.Solver(Half(), tolerance_factor=0.1), jf.Solver(Half(), stopping=jf.Stopping(3)),
    jf.Solver(jf.Segments(2), stopping=jf.Stopping(ebound=1e-4)),
]  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
def test_blocks_of_a_tarflow_are_swept_as_by_the_oracle(name: str) -> None:
    """With keys in a cache, labels and guidance. Where samples have fronts of their own, each is solved alone here."""
    problem = flow_problem(name)
    for solver in FLOW_SOLVERS:
        has_rules = solver.stopping != jf.Stopping()
        own = not has_rules and isinstance(solver.partition, jf.SlidingRun)
        for rows in [slice(n, n + 1) for n in range(3)] if own else [slice(0, 3)]:
            part = problem.of(rows)
            check(part, solver, solver.guess(part.z), None if has_rules else 1e-2)


def batched(runs: list[list[int]], size: int, length: int, batch_size: int) -> tuple[int, list[int]]:
    """Tokens times samples, and the samples of each sweep, where these go through by `batch_size`.

    `runs` has where each sample stands after each of its sweeps. Samples that have finished leave, and others take
    their places, once they are a quarter of the batch.
    """
    waiting, batch, evaluations, samples = list(runs), list[list[int]](), 0, []
    while waiting or batch:
        done = sum(len(run) == 1 for run in batch)
        if done >= len(batch) / 4:
            batch = [run for run in batch if len(run) > 1]
            while waiting and len(batch) < batch_size:
                batch.append(list(waiting.pop(0)))
        if not batch:
            continue
        evaluations += len(batch) * min(size, length - min(run[0] for run in batch))
        samples.append(len(batch))
        batch = [run[1:] or run for run in batch]
    return evaluations, samples


@pytest.mark.parametrize("tolerance", [1e-9, 1e-3])
@pytest.mark.parametrize("size", [1, 5, 16, None])
def test_each_sample_has_its_own_front(size: int | None, tolerance: float) -> None:
    """It is swept as it is alone, however many there are at a time; those that have finished leave."""
    solver = jf.Solver(jf.Whole() if size is None else jf.Window(size))
    parts = [echoes().of(slice(n, n + 1)) for n in range(7)]
    want = [expected(part, solver, part.z, tolerance, keys=False) for part in parts]
    for batch_size in (None, 1, 3, 6):
        problem = echoes(keys=False, slack=tolerance)
        solution = attempt(problem.block, problem.z, solver, problem.labels, tolerance=tolerance, batch_size=batch_size)
        for n, one in enumerate(want):
            assert error(solution.x[n : n + 1], one.x) < EXACT
        assert solution.sample_sweeps.tolist() == [one.sweeps for one in want]
        torch.testing.assert_close(solution.residual, torch.cat([one.residual for one in want]), rtol=1e-6, atol=EXACT)
        assert (solution.status == jf.Status.CONVERGED).all()
        evaluations, samples = batched([one.fronts for one in want], size or 24, 24, batch_size or 7)
        assert [count for _, _, count in problem.block.calls] == samples
        assert solution.sweeps == solution.network_calls == len(samples)
        assert solution.token_evaluations == evaluations
        assert solution.exact.tolist() == [size == 1] * 7


def test_inputs_stay_and_answers_are_ordinary_tensors() -> None:
    problem, start = flow_problem("nvp 9x4, guided"), normal(3, 9, 4)
    before = problem.z.clone(), start.clone()
    window = jf.Window(3)
    for solver in (jf.Solver(window, jf.WarmStart(start)), jf.Solver(window), jf.Solver(jf.Sequential())):
        solution = jf.solve(problem.block, problem.z, solver, problem.labels)
        assert not solution.x.is_inference()
        assert solution.seconds > 0
    assert torch.equal(problem.z, before[0])
    assert torch.equal(start, before[1])


def test_only_a_pure_block_runs_in_inference_mode() -> None:
    """A tensor that a block keeps from it could not be trained with later."""
    modes: list[tuple[bool, bool]] = []

    def g(x: Tensor, z: Tensor, _: Any) -> Tensor:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return z

    for is_pure in (False, True):
        block: Any = Watched(g)
        block.is_pure = is_pure
        jf.solve(block, normal(2, 5, 1), jf.Solver())
    assert modes == [(False, False)] * 2 + [(False, True)] * 2


@pytest.mark.parametrize("fronts", [False, True], ids=["one front", "fronts"])
@pytest.mark.parametrize(("solver", "tolerance"), OVERFLOWING, ids=str)
def test_a_sample_that_overflows_ends_at_its_answer_or_as_nonfinite(
    solver: jf.Solver, tolerance: float | None, fronts: bool
) -> None:
    """It neither harms another nor has it wait; if it overflows for good, it leaves."""
    problem, tame = steep_problem([0, 1, 0, 1], fronts), [0, 2]
    solution = attempt(problem.block, problem.z, solver, problem.labels, tolerance=tolerance)
    lost = solution.status == jf.Status.NONFINITE
    assert solution.x.isfinite().all()
    assert not lost[tame].any()
    assert torch.equal(solution.residual.isinf(), lost)
    converged = solution.status == jf.Status.CONVERGED
    assert error(solution.x[converged], problem.answer[converged]) < 1e-7
    if solver.stopping.max_sweeps is not None:
        assert lost.tolist() == [False, True, False, True]
    if solver.stopping.max_sweeps != 2:  # where a batch shares a window, its place depends on the batch
        alone = attempt(
            problem.block, problem.z[tame], solver, torch.zeros(2, dtype=torch.float64), tolerance=tolerance
        )
        assert error(solution.x[tame], alone.x) < 1e-7
        assert torch.equal(solution.status[tame], alone.status)
        assert (solution.sample_sweeps[tame] >= alone.sample_sweeps).all()


def test_a_value_that_overflows_goes_back_to_the_guess() -> None:
    """The next sweep sees neither it nor the value before it."""
    seen: list[Tensor] = []

    def noted(x: Tensor, z: Tensor, context: Tensor) -> Tensor:
        seen.append(x.clone())
        return steep(x, z, context)

    problem = steep_problem([0, 1, 0, 1])
    guess = problem.z + 0.25
    solver = jf.Solver(jf.Whole(), jf.WarmStart(guess), jf.Stopping(4))
    attempt(Watched(noted, keys=False), problem.z, solver, problem.labels, tolerance=None)
    assert torch.equal(seen[0], guess)
    for sweep, (before, after) in enumerate(pairwise(seen)):
        g = problem.g(before)[:, sweep:]
        finite = g.isfinite().all(dim=2, keepdim=True)
        assert torch.equal(after[:, sweep:], torch.where(finite, g, guess[:, sweep:]))
        assert torch.equal(after[:, :sweep], before[:, :sweep])
    assert len(seen) == 4


class Lowered(WatchedFronts):
    """A bfloat16 network, that is, a map that is a hundredth off, on demand."""

    def to_bf16(self, cache: Any) -> Any:
        cache.context = cache.context + 0.01
        return cache


@pytest.mark.parametrize(("count", "made"), [(1, 1), (3, 3), (40, 17)])
def test_bf16_sweeps_come_first(count: int, made: int) -> None:
    """All of those samples, and none more than there are tokens; the pieces start from their answer."""
    z, strengths = normal(4, LENGTH, 2), torch.full((4,), 0.9, dtype=torch.float64)
    low = swept(lambda x: echo(x, z, strengths + 0.01), z, lambda front: LENGTH, limits=[count] * LENGTH)
    fine = jf.Solver(jf.Segments(2), jf.Bf16Sweeps(count), stopping=jf.Stopping(2))
    halves = partial(fine.partition.stop, num_tokens=LENGTH)
    want = swept(lambda x: echo(x, z, strengths), low.x, halves, limits=[2] * LENGTH)
    for batch_size in (None, 2):
        solution = attempt(Lowered(echo), z, fine, strengths, tolerance=None, batch_size=batch_size)
        assert error(solution.x, want.x) < EXACT
        turns = 4 // (batch_size or 4)
        assert solution.sweeps == solution.network_calls == (made + want.sweeps) * turns
        assert solution.token_evaluations == low.evaluations + want.evaluations
        assert solution.sample_sweeps.tolist() == [made + want.sweeps] * 4


@dataclass(frozen=True)
class Stuck(jf.Partition):
    """A run that ends where it starts, or beyond the sequence."""

    end: int

    def stop(self, front: int, num_tokens: int) -> int:
        return self.end


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"z": normal(2, 5, 1).bfloat16()}, "torch.bfloat16: give float32 or float64"),
        ({"z": normal(2, 5)}, r"a tensor \(2, 5\) .*: give float32 or float64 tokens"),
        ({"z": normal(2, 5, 1, 1)}, r"a tensor \(2, 5, 1, 1\) .*: give float32 or float64 tokens"),
        ({"z": normal(2, 0, 1)}, r"a tensor \(2, 0, 1\) .*: give float32 or float64 tokens"),
        ({"context": normal(3)}, "context=a tensor .*: give a row for each of the 2 rows of z"),
        ({"solver": jf.Solver(jf.Segments(6))}, "only 5 tokens"),
        ({"solver": jf.Solver(Stuck(0))}, r"Stuck\(end=0\).*0 to 0"),
        ({"solver": jf.Solver(Stuck(6))}, r"Stuck\(end=6\).*0 to 6"),
        ({"solver": jf.Solver(guess=jf.Bf16Sweeps(2))}, "Bf16Sweeps.*: Watched has no bfloat16 network"),
        ({"tolerance": None}, r"tolerance=None: nothing would end the sweeps of Whole\(\); give a tolerance"),
    ],
)
def test_solve_refuses_what_does_not_fit(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises((TypeError, ValueError), match=names):
        jf.solve(**{"block": Watched(lambda x, z, _: z), "z": normal(2, 5, 1), "solver": jf.Solver(), **arguments})


def test_a_batch_without_samples_is_solved() -> None:
    none, block = torch.zeros(0, 16, 1), flow_problem("vp 16x1").block
    assert jf.solve(block, none, jf.Solver()).x.shape == none.shape


def test_a_solve_gives_up_after_its_time_limit() -> None:
    z = normal(2, 40, 1)
    assert jf.solve(Watched(lambda x, z, _: z), z, jf.Solver(), time_limit=60).x.equal(z)
    with pytest.raises(TimeoutError, match="time limit"):
        jf.solve(Watched(lambda x, z, _: z), z, jf.Solver(), time_limit=1e-9)
