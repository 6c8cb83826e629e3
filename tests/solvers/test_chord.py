"""What brings an inverse sooner: calibrated guesses and corrections, a front per sample, continuous batching.

Convolutions against plain loops, fronts against a loop over one sample at a time, and answers against the fixed point
of the oracle's map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacobiflow.calibration.fit import fit_chord, fit_guess
from oracle import Guide, Oracle, jacobi, sequential
from problems import BlockProblem, Ledger, latents, make_flow
from torch import Tensor

import jacobiflow as jf
from jacobiflow.flows.base import FrontPerSample
from jacobiflow.guidance import guided as under
from jacobiflow.solvers import Given

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
plans = settings(max_examples=60, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(x: Tensor, answer: Tensor) -> float:
    assert x.shape == answer.shape
    return float((x - answer).abs().max()) if x.numel() else 0.0


# ------------------------------------------------------------------------------------------------ the two convolutions


def convolved(kernel: np.ndarray, x: np.ndarray, delay: int) -> np.ndarray:
    """y_t = sum over d of kernel[d] x_(t - d - delay), tokens before the first being 0."""
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for d in range(min(len(kernel), t - delay + 1)):
                y[b, t] += kernel[d] @ x[b, t - d - delay]
    return y


@dataclass(frozen=True)
class Tokens:
    """Random kernel, shift, and two sequences; the kernel may be longer than they are."""

    kernel: Tensor
    shift: Tensor
    x: Tensor
    g: Tensor


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    batch, length, channels, width = (draw(st.integers(1, most)) for most in (3, 8, 4, 12))
    seed = draw(st.integers(0, 10**6))
    x, g = normal(2, batch, length, channels, seed=seed).unbind()
    return Tokens(normal(width, channels, channels, seed=seed + 1), normal(length, channels, seed=seed + 2), x, g)


@given(tokens())
@plans
def test_a_chord_adds_its_convolution_of_the_residual(given: Tokens) -> None:
    kept = given.x.clone(), given.g.clone()
    stepped = jf.Chord(given.kernel)(given.x, given.g)
    expected = given.g.numpy() + convolved(given.kernel.numpy(), (given.g - given.x).numpy(), delay=1)
    assert np.allclose(stepped.numpy(), expected, rtol=0, atol=1e-12)
    assert torch.equal(given.x, kept[0])
    assert torch.equal(given.g, kept[1])
    in_float32 = jf.Chord(given.kernel)(given.x.float(), given.g.float())
    assert in_float32.dtype == torch.float32
    assert np.allclose(in_float32.numpy(), expected, rtol=0, atol=1e-3)


def test_a_convolution_of_many_numbers_is_made_in_parts() -> None:
    """At the width of the paper's largest tokens a few samples go through at a time; each is what it is alone."""
    chord = jf.Chord(normal(24, 192, 192, seed=1) / 100)
    x, g = normal(2, 5, 700, 192).unbind()
    alone = [chord(x[i : i + 1], g[i : i + 1]) for i in range(5)]
    assert error(chord(x, g), torch.cat(alone)) < 1e-12
    window = slice(100, 160)
    expected = g[:, window].numpy() + convolved(chord.kernel.numpy(), (g - x)[:, window].numpy(), delay=1)
    assert np.allclose(chord(x[:, window], g[:, window]).numpy(), expected, rtol=0, atol=1e-12)


@given(tokens())
@plans
def test_a_causal_linear_guess_is_its_convolution_and_its_shift(given: Tokens) -> None:
    kept = given.x.clone()
    start = jf.CausalLinear(given.kernel, given.shift)(given.x)
    expected = convolved(given.kernel.numpy(), given.x.numpy(), delay=0) + given.shift.numpy()
    assert np.allclose(start.numpy(), expected, rtol=0, atol=1e-12)
    assert torch.equal(given.x, kept)
    assert start.data_ptr() != given.x.data_ptr()
    assert jf.CausalLinear(given.kernel, given.shift)(given.x.float()).dtype == torch.float32


@given(tokens(), st.data())
@plans
def test_both_are_causal_and_the_chord_strictly(given: Tokens, data: st.DataObject) -> None:
    t = data.draw(st.integers(0, given.x.shape[1] - 1))
    x, g = given.x.clone(), given.g.clone()
    x[:, t:], g[:, t:] = x[:, t:] + 1, g[:, t:] - 3
    guess, chord = jf.CausalLinear(given.kernel, given.shift), jf.Chord(given.kernel)
    assert error(guess(x)[:, :t], guess(given.x)[:, :t]) < EXACT if t else True
    # What a chord adds to g_t knows nothing of token t.
    added, before = chord(x, g) - g, chord(given.x, given.g) - given.g
    assert error(added[:, : t + 1], before[:, : t + 1]) < EXACT


@given(tokens(), st.data())
@plans
def test_a_token_behind_no_residual_becomes_g(given: Tokens, data: st.DataObject) -> None:
    """Bit for bit: Proposition 1 rests on it."""
    t = data.draw(st.integers(0, given.x.shape[1] - 1))
    x = given.x.clone()
    x[:, :t] = given.g[:, :t]
    assert torch.equal(jf.Chord(given.kernel)(x, given.g)[:, : t + 1], given.g[:, : t + 1])


@given(tokens(), st.data())
@plans
def test_a_residual_that_overflowed_says_nothing_of_other_tokens(given: Tokens, data: st.DataObject) -> None:
    bad = st.sampled_from([math.nan, math.inf, -math.inf])
    places = st.tuples(*(st.integers(0, size - 1) for size in given.x.shape))
    x, g = given.x.clone(), given.g.clone()
    for place, value in data.draw(st.lists(st.tuples(places, bad), max_size=4)):
        g[place] = value
    for place, value in data.draw(st.lists(st.tuples(places, bad), max_size=2)):
        x[place] = value
    residual = (g - x).numpy()
    residual[~np.isfinite(residual)] = 0
    stepped = jf.Chord(given.kernel)(x, g)
    known = torch.isfinite(g)
    assert stepped[known].isfinite().all()
    expected = g + torch.from_numpy(convolved(given.kernel.numpy(), residual, delay=1))
    assert torch.allclose(stepped[known], expected[known], rtol=0, atol=1e-12)


KERNEL, SHIFT = normal(3, 2, 2), normal(5, 2)


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


BAD_KERNELS: dict[str, Any] = {
    "none": None,
    "list": [[[1.0]]],
    "array": np.ones((1, 2, 2)),
    "matrix": KERNEL[0],
    "four axes": KERNEL[None],
    "not square": torch.ones(3, 2, 4),
    "no tokens": torch.ones(0, 2, 2),
    "nan": with_value(KERNEL, math.nan),
    "infinity": with_value(KERNEL, -math.inf),
}


@pytest.mark.parametrize("kernel", BAD_KERNELS.values(), ids=BAD_KERNELS)
def test_a_kernel_that_is_none_is_refused(kernel: Any) -> None:
    with pytest.raises(ValueError, match="Chord"):
        jf.Chord(kernel)
    with pytest.raises(ValueError, match="CausalLinear"):
        jf.CausalLinear(kernel, SHIFT)


BAD_SHIFTS: dict[str, Any] = {
    "none": None,
    "list": [[0.0, 0.0]],
    "vector": SHIFT[0],
    "three axes": SHIFT[None],
    "other channels": torch.zeros(5, 3),
    "nan": with_value(SHIFT, math.nan),
    "infinity": with_value(SHIFT, math.inf),
}


@pytest.mark.parametrize("shift", BAD_SHIFTS.values(), ids=BAD_SHIFTS)
def test_a_shift_that_does_not_fit_is_refused(shift: Any) -> None:
    with pytest.raises(ValueError, match="CausalLinear: shift"):
        jf.CausalLinear(KERNEL, shift)


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 6, 2), (1, 5, 1), (1, 5, 3)], ids=str)
def test_a_linear_guess_refuses_tokens_of_another_flow(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        jf.CausalLinear(KERNEL, SHIFT)(torch.zeros(shape))


def test_chords_are_equal_where_their_kernels_are() -> None:
    chord, same = jf.Chord(KERNEL), jf.Chord(KERNEL.clone())
    assert chord == same
    assert hash(chord) == hash(same)
    shorter, other = jf.Chord(KERNEL[:2]), jf.Chord(with_value(KERNEL, 0.5))
    assert all(chord != unlike for unlike in (shorter, other, jf.Plain(), None))
    assert len({chord, same, shorter, other}) == 3
    assert repr(chord) == "Chord(3 tokens, 2 channels)"
    assert jf.Solver(correction=chord) == jf.Solver(correction=same) != jf.Solver(correction=other)


def test_linear_guesses_are_equal_where_kernels_and_shifts_are() -> None:
    guess, same = jf.CausalLinear(KERNEL, SHIFT), jf.CausalLinear(KERNEL.clone(), SHIFT.clone())
    assert guess == same
    assert hash(guess) == hash(same)
    others = [
        jf.CausalLinear(KERNEL[:2], SHIFT),
        jf.CausalLinear(with_value(KERNEL, 0.5), SHIFT),
        jf.CausalLinear(KERNEL, with_value(SHIFT, 0.5)),
        jf.CausalLinear(KERNEL, SHIFT[:4]),
    ]
    assert all(guess != unlike for unlike in (*others, jf.Latent(), jf.MeanAffine(SHIFT, SHIFT), None))
    assert len({guess, same, *others}) == 5
    assert repr(guess) == "CausalLinear(5 tokens, 2 channels, from 3 latents)"
    assert jf.Solver(guess=guess) == jf.Solver(guess=same) != jf.Solver(guess=others[0])


# --------------------------------------------------------------------------------- real blocks and the oracle's answers


@dataclass(frozen=True)
class Problem(BlockProblem):
    """One block to invert, and what is asked of its answers."""

    def residual(self, x: Tensor) -> float:
        """By the oracle."""
        return error(self.g(x), x.double())

    def rows(self, rows: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs and labels of some of the samples."""
        return self.z[rows], None if self.labels is None else self.labels[rows]


def _map(oracle: Oracle, i: int, z: Tensor, labels: Tensor | None, guide: Guide | None, x: Tensor) -> Tensor:
    return oracle.g(i, x, z, labels, guide)


@cache
def loaded(name: str) -> jf.TarFlow:
    """A bundled flow in float64, not to be changed."""
    return copy.deepcopy(jf.load(name)).double()


def problem_of(
    flow: jf.TarFlow, i: int, num: int, seed: int, labels: Tensor, guide: Guide | None = None, solved: bool = True
) -> Problem:
    """Block i at the latents that a flow draws for its last block. Plain sweeps go on until no bit of note changes."""
    oracle = Oracle(flow)
    z = oracle.flip(i, latents(flow, num, seed) * oracle.var.sqrt())
    g = partial(_map, oracle, i, z, labels, guide)
    answer, sweeps = z, 0
    while solved and sweeps < z.shape[1] and error(new := g(answer), answer) > 1e-14:
        answer, sweeps = new, sweeps + 1
    block: Any = flow.blocks[i]
    if guide is not None:
        on: Any = guide.on
        block = under(block, jf.Guidance(guide.weight, guide.annealed, on, guide.temperature))
    return Problem(block, g, z, labels, answer)


GUIDE = Guide(0.8, annealed=True, on="both", temperature=0.7)


@cache
def digits(guided: bool = False) -> Problem:
    """64 tokens, at five samples with labels and one without."""
    problem = problem_of(loaded("digits-p1"), 3, 6, 1, torch.tensor([0, 5, -1, 9, 3, 7]), GUIDE if guided else None)
    if not guided:
        assert error(sequential(problem.g, problem.z), problem.answer) < 1e-12
    return problem


@cache
def fashion() -> Problem:
    """196 tokens, the tough block."""
    problem = problem_of(loaded("fashion-p2"), 7, 2, 1, torch.tensor([4, 8]))
    assert problem.residual(problem.answer) < 1e-13
    return problem


@cache
def fitted(name: str, i: int, seed: int = 100) -> tuple[jf.CausalLinear, jf.Chord]:
    """Guess and chord fitted to a block, at latents that no test solves."""
    flow = jf.load(name)
    z = latents(flow, 8, seed) * flow.var.sqrt()
    labels = torch.arange(8)
    x = jf.solve(flow.blocks[i], z, jf.Solver(jf.Sequential()), labels).x
    guess = fit_guess(x, z)
    return guess, fit_chord(flow.blocks[i], x, z, guess, labels)


def random_chord(channels: int, scale: float) -> jf.Chord:
    return jf.Chord(scale * normal(6, channels, channels, seed=4) / math.sqrt(6 * channels))


def random_guess(length: int, channels: int) -> jf.CausalLinear:
    return jf.CausalLinear(0.4 * normal(5, channels, channels, seed=8), 0.5 * normal(length, channels, seed=9))


PARTITIONS: dict[str, Any] = {
    "sequential": jf.Sequential(),
    "whole": jf.Whole(),
    "segments 7": jf.Segments(7),
    "window 1": jf.Window(1),
    "window 8": jf.Window(8),
    "window 24": jf.Window(24),
    "window beyond the end": jf.Window(1000),
}
GUESSES: dict[str, Callable[[Problem], Any]] = {
    "latent": lambda problem: jf.Latent(),
    "zeros": lambda problem: jf.Zeros(),
    "linear": lambda problem: random_guess(*problem.z.shape[1:]),
}
CORRECTIONS: dict[str, Callable[[Problem], Any]] = {
    "plain": lambda problem: jf.Plain(),
    "small chord": lambda problem: random_chord(problem.z.shape[2], 0.1),
    "wild chord": lambda problem: random_chord(problem.z.shape[2], 10),
}


def assert_solved(problem: Problem, solver: jf.Solver, atol: float, overflows: bool = False) -> None:
    """Raw and certified solutions are there, and say what they are. Only what `overflows` may need the certificate."""
    raw = jf.solve(problem.block, problem.z, solver, problem.labels)
    converged = raw.status == jf.Status.CONVERGED
    assert (raw.status[~converged] == jf.Status.NONFINITE).all()
    assert overflows or converged.all()
    assert (raw.residual[converged] <= atol).all()
    assert raw.sweeps == raw.network_calls == raw.sample_sweeps.max()
    assert raw.sweeps <= problem.length
    assert error(raw.x[converged], problem.answer[converged]) < 100 * atol
    solution = jf.solve_certified(problem.block, problem.z, solver, problem.labels)
    assert (solution.status == jf.Status.CONVERGED).all()
    assert (solution.residual <= atol).all()
    assert problem.residual(solution.x) <= atol + 1e-12
    assert error(solution.x, problem.answer) < 30 * atol
    assert solution.resolved_sequentially[~converged].all()


# One token at a time leaves nothing to a guess or a correction.
PIECES = [(partition, "linear", "wild chord") for partition in ("sequential", "window 1")] + [
    (partition, guess, correction)
    for partition in PARTITIONS
    if partition not in ("sequential", "window 1")
    for guess in GUESSES
    for correction in CORRECTIONS
]


@pytest.mark.parametrize(("partition", "guess", "correction"), PIECES)
def test_every_solver_brings_a_real_block_to_its_tolerance(partition: str, guess: str, correction: str) -> None:
    problem = digits()
    pieces = PARTITIONS[partition], GUESSES[guess](problem), jf.Tolerance(1e-7), CORRECTIONS[correction](problem)
    assert_solved(problem, jf.Solver(*pieces), 1e-7, correction == "wild chord")


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(
    ("partition", "guess"),
    [("whole", "linear"), ("segments 7", "zeros"), ("window 24", "latent")],
)
def test_every_solver_brings_a_tough_block_to_its_tolerance(partition: str, guess: str, correction: str) -> None:
    problem = fashion()
    pieces = PARTITIONS[partition], GUESSES[guess](problem), jf.Tolerance(1e-5), CORRECTIONS[correction](problem)
    assert_solved(problem, jf.Solver(*pieces), 1e-5, correction == "wild chord")


@pytest.mark.parametrize(("block", "partition"), [(0, "whole"), (6, "whole"), (6, "segments 7"), (0, "window 24")])
def test_a_chord_of_another_block_does_no_harm(block: int, partition: str) -> None:
    problem = fashion()
    guess, chord = fitted("fashion-p2", block)
    solver = jf.Solver(PARTITIONS[partition], guess, jf.Tolerance(1e-5), chord)
    assert_solved(problem, solver, 1e-5)


def test_a_chord_under_which_residuals_grow_costs_few_sweeps() -> None:
    """A sample whose residual keeps growing is swept plainly from there on."""
    for problem in (digits(), fashion()):
        solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-5))
        plain = jf.solve(problem.block, problem.z, solver, problem.labels)
        off = replace(solver, correction=random_chord(problem.z.shape[2], 1))
        solution = jf.solve(problem.block, problem.z, off, problem.labels)
        assert (solution.status == jf.Status.CONVERGED).all()
        assert (solution.sample_sweeps <= plain.sample_sweeps + 12).all()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("sweeps", [1, 2, 5, 9])
def test_k_sweeps_make_k_tokens_exact_whatever_the_correction(sweeps: int, correction: str) -> None:
    """One more where the guess has the first. No sample that did not overflow breaks the law."""
    problem = digits()
    for name, exact in (("latent", sweeps + 1), ("zeros", sweeps + 1), ("linear", sweeps)):
        pieces = jf.Whole(), GUESSES[name](problem), jf.MaxSweeps(sweeps), CORRECTIONS[correction](problem)
        solution = jf.solve(problem.block, problem.z, jf.Solver(*pieces), problem.labels)
        finite = solution.status != jf.Status.NONFINITE
        assert finite.all() or correction == "wild chord"
        x, answer = solution.x[finite], problem.answer[finite]
        assert error(x[:, :exact], answer[:, :exact]) < EXACT
        assert error(x[:, exact:], answer[:, exact:]) > 1e-6 or not finite.any()


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_chord_sweeps_are_those_of_no_cache(sweeps: int, guess: str) -> None:
    problem = digits()
    chord, start = random_chord(1, 0.3), GUESSES[guess](problem)
    x = start(problem.z)
    for _ in range(sweeps):
        residual = (problem.g(x) - x).numpy()
        x = x + torch.from_numpy(residual + convolved(chord.kernel.numpy(), residual, delay=1))
    solver = jf.Solver(jf.Whole(), start, jf.MaxSweeps(sweeps), chord)
    assert error(jf.solve(problem.block, problem.z, solver, problem.labels).x, x) < EXACT


@pytest.mark.parametrize("correction", ["plain", "small chord"])
@pytest.mark.parametrize("partition", ["whole", "segments 7", "window 8", "window beyond the end"])
def test_a_tolerance_of_0_ends_at_the_answer_and_repeats(partition: str, correction: str) -> None:
    problem = digits()
    solver = jf.Solver(PARTITIONS[partition], jf.Zeros(), jf.Tolerance(0), CORRECTIONS[correction](problem))
    first, again = (jf.solve(problem.block, problem.z, solver, problem.labels) for _ in range(2))
    assert first.sweeps <= problem.length
    assert (first.residual == 0).all()
    assert (first.status == jf.Status.CONVERGED).all()
    assert error(first.x, problem.answer) < 1e-13
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.sample_sweeps, again.sample_sweeps)


# ---------------------------------------------------------------------------- weights whose plain sweeps overflow


def _iterates(g: Callable[[Tensor], Tensor], x: Tensor, count: int) -> list[Tensor]:
    found = [x]
    for _ in range(count):
        found.append(jacobi(g, found[-1], 1))
    return found


@cache
def overflowing(seed: int, scale: float) -> Problem:
    """Exact inverses of all six samples are moderate; plain sweeps of some go beyond float64 on the way."""
    config = jf.TarFlowConfig(1, 10, 2, channels=32, num_blocks=1, layers_per_block=2, head_dim=16, expansion=2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        flow = jf.TarFlow(config).double().eval()
        flow.blocks[0].pos_embed.mul_(30)
        flow.blocks[0].proj_out.weight.normal_(std=scale)
    z = latents(flow, 6, seed=3)
    g = partial(_map, Oracle(flow), 0, z, None, None)
    answer = sequential(g, z)
    assert answer.abs().max() < 100
    swept = torch.stack(_iterates(g, z, 12))
    assert not swept.isfinite().all()
    assert swept.isfinite().all(dim=(2, 3)).all(dim=0).any()
    return Problem(flow.blocks[0], g, z, None, answer)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("partition", [jf.Whole(), jf.Segments(3), jf.Window(9)], ids=str)
@pytest.mark.parametrize(("seed", "scale"), [(5, 0.12), (28, 0.16)])
def test_samples_that_overflow_on_the_way_are_solved_too(
    seed: int, scale: float, partition: Any, correction: str
) -> None:
    problem = overflowing(seed, scale)
    for guess in GUESSES.values():
        solver = jf.Solver(partition, guess(problem), jf.Tolerance(1e-7), CORRECTIONS[correction](problem))
        given_up = jf.solve(problem.block, problem.z, solver).status == jf.Status.NONFINITE
        solution = jf.solve_certified(problem.block, problem.z, solver)
        assert (solution.status == jf.Status.CONVERGED).all()
        assert (solution.residual <= 1e-7).all()
        assert problem.residual(solution.x) <= 1.001e-7
        assert error(solution.x, problem.answer) < 1e-3
        assert solution.resolved_sequentially[given_up].all()
        few = jf.solve_certified(problem.block, problem.z, solver, slots=4)
        assert (few.status == jf.Status.CONVERGED).all()
        assert error(few.x, problem.answer) < 1e-3


# -------------------------------------------------------------------------------------------------- a front per sample


class EchoBlock:
    """x_t = z_t + strength sin(sum over s < t of 0.8^(t-s-1) x_s), a strength per row; no cache, one front."""

    def init_cache(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z.new_ones(len(z), 1, 1) if context is None else context.view(-1, 1, 1)

    def whole(self, x: Tensor, z: Tensor, cache: Tensor) -> Tensor:
        assert len(x) == len(z) == len(cache)
        age = torch.arange(x.shape[1]).view(-1, 1) - torch.arange(x.shape[1]) - 1
        heard = torch.where(age >= 0, 0.8 ** age.clamp(min=0).to(x.dtype), 0.0)
        return z + cache * (heard @ x).sin()

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Tensor) -> Tensor:
        assert 0 <= start < stop <= x.shape[1]
        return self.whole(x, z, cache)[:, start:stop]


class RaggedEchoBlock(EchoBlock, FrontPerSample):
    """The same, with a front per sample."""

    def update_at(self, x: Tensor, z: Tensor, start: Tensor, size: int, end: int, cache: Tensor) -> Tensor:
        assert start.min() >= 0
        assert start.max() + size == end <= x.shape[1]
        whole = self.whole(x, z, cache)
        return torch.stack([row[first : first + size] for row, first in zip(whole, start.tolist(), strict=True)])

    def take(self, cache: Tensor, rows: Tensor) -> Tensor:
        return cache[rows]

    def join(self, caches: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(caches))


LENGTH = 40
STRENGTH = torch.tensor([0.1, 1.5, 0.5, 0.9, 0.0, 1.2, 0.3], dtype=torch.float64)


@cache
def echo(ragged: bool) -> Problem:
    z = normal(len(STRENGTH), LENGTH, 2, seed=2)
    block = RaggedEchoBlock() if ragged else EchoBlock()
    answer = z.clone()
    for t in range(1, LENGTH):
        heard = sum(0.8 ** (t - s - 1) * answer[:, s] for s in range(t))
        answer[:, t] = z[:, t] + STRENGTH.view(-1, 1) * heard.sin()  # type: ignore[union-attr]
    return Problem(block, lambda x: block.whole(x, z, STRENGTH.view(-1, 1, 1)), z, STRENGTH, answer)


def swept_alone(
    g: Callable[[np.ndarray], np.ndarray], guess: np.ndarray, size: int, atol: float, kernel: np.ndarray
) -> tuple[np.ndarray, int, float]:
    """One sample (T, C): a window behind its front, what it ends at, sweeps, and the largest residual settled."""
    x, front, count, largest = guess.copy(), 0, 0, 0.0
    while front < len(x):
        stop, count = min(front + size, len(x)), count + 1
        residual = (g(x) - x)[front:stop]
        step = residual + convolved(kernel, residual[None], delay=1)[0]
        x[front:stop] += step
        lead = 0
        while stop - front > 1 and lead < stop - front:
            if max(np.abs(residual[lead]).max(), np.abs(step[lead]).max()) > atol:
                break
            largest = max(largest, np.abs(residual[lead]).max())
            lead += 1
        front = min(front + lead + 1, stop)
    return x, count, largest


FRONTS = [(size, atol, 0.0) for size in (1, 2, 5, 16, 39, 1000, None) for atol in (0.0, 1e-9, 1e-3, 1e-1)]
FRONTS += [(size, atol, 0.2) for size in (16, 39, 1000, None) for atol in (1e-9, 1e-3)]
FRONTS += [(16, 1e-1, 0.2)]  # where a step is larger than the residual that it comes from


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize(("size", "atol", "chord"), FRONTS)
def test_each_sample_has_its_own_front(size: int | None, atol: float, chord: float, slots: int | None) -> None:
    """Every sample is swept as it is alone, by a loop that knows no other."""
    problem = echo(ragged=True)
    kernel = chord * normal(4, 2, 2, seed=6)
    partition = jf.Whole() if size is None else jf.Window(size)
    correction = jf.Chord(kernel) if chord else jf.Plain()
    solver = jf.Solver(partition, jf.Latent(), jf.Tolerance(atol), correction)
    solution = jf.solve(problem.block, problem.z, solver, problem.labels, slots)
    for n in range(len(problem.z)):
        start = problem.z[n].numpy()

        def g(x: np.ndarray, n: int = n) -> np.ndarray:
            full = problem.z.clone()
            full[n] = torch.from_numpy(x)
            return problem.g(full)[n].numpy()

        x, sweeps, largest = swept_alone(g, start, size or LENGTH, atol, kernel.numpy())
        if atol:
            assert error(solution.x[n], torch.from_numpy(x)) < EXACT
            assert solution.sample_sweeps[n] == sweeps
            assert solution.residual[n] == pytest.approx(largest, rel=1e-6, abs=1e-12)
        assert solution.residual[n] <= atol
        assert error(solution.x[n], problem.answer[n]) <= 100 * atol + 1e-12
    if slots is None:
        assert solution.sweeps == solution.sample_sweeps.max()


def alone(problem: Problem, solver: jf.Solver) -> list[jf.Solution]:
    return [
        jf.solve(problem.block, z, solver, labels)
        for z, labels in (problem.rows(slice(n, n + 1)) for n in range(len(problem.z)))
    ]


RAGGED = [jf.Whole(), jf.Window(5), jf.Window(24), jf.Window(1000)]


@pytest.mark.parametrize("partition", RAGGED, ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_sample_is_what_it_is_alone(guided: bool, partition: Any) -> None:
    """To the tolerance: keys of tokens that are done may be those of before their last change, or of after it."""
    problem = digits(guided)
    for atol, allowed in ((1e-12, EXACT), (1e-3, 2e-2)):
        solver = jf.Solver(partition, stopping=jf.Tolerance(atol))
        together = jf.solve(problem.block, problem.z, solver, problem.labels)
        assert together.sweeps == together.sample_sweeps.max()
        assert together.sample_sweeps.min() < together.sample_sweeps.max()
        assert error(together.x, problem.answer) < allowed
        for n, solution in enumerate(alone(problem, solver)):
            assert error(together.x[n], solution.x[0]) < allowed
            assert abs(together.sample_sweeps[n] - solution.sweeps) <= 1
            assert solution.sample_sweeps == solution.sweeps


@pytest.mark.parametrize("atol", [1e-12, 1e-3])
@pytest.mark.parametrize("partition", RAGGED, ids=str)
@pytest.mark.parametrize("name", ["digits", "guided digits", "echo"])
def test_a_permuted_batch_has_permuted_answers(name: str, partition: Any, atol: float) -> None:
    problem = {"digits": digits(), "guided digits": digits(True), "echo": echo(True)}[name]
    solver = jf.Solver(partition, stopping=jf.Tolerance(atol), correction=random_chord(problem.z.shape[2], 0.1))
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    straight = jf.solve(problem.block, *_with(problem.rows(order.sort().values), solver))
    permuted = jf.solve(problem.block, *_with(problem.rows(order), solver))
    assert error(permuted.x, straight.x[order]) < EXACT
    assert torch.equal(permuted.sample_sweeps, straight.sample_sweeps[order])
    assert torch.allclose(permuted.residual, straight.residual[order], rtol=1e-6, atol=1e-13)
    assert permuted.sweeps == straight.sweeps


def _with(rows: tuple[Tensor, Tensor | None], solver: jf.Solver) -> tuple[Tensor, jf.Solver, Tensor | None]:
    return rows[0], solver, rows[1]


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("size", [5, 24])
def test_a_window_evaluates_no_more_than_its_tokens(size: int, slots: int | None) -> None:
    """In every sweep, for every sample that is in the batch; and every token of every sample once at least."""
    for problem in (echo(ragged=True), digits()):
        solver = jf.Solver(jf.Window(size), stopping=jf.Tolerance(1e-6))
        solution = jf.solve(problem.block, problem.z, solver, problem.labels, slots)
        batch, length, _ = problem.z.shape
        assert batch * length <= solution.token_evaluations <= solution.sweeps * min(batch, slots or batch) * size


def test_whole_evaluates_no_more_than_all_tokens() -> None:
    for problem in (echo(ragged=True), digits()):
        solution = jf.solve(problem.block, problem.z, jf.Solver(), problem.labels)
        batch, length, _ = problem.z.shape
        assert batch * length <= solution.token_evaluations <= solution.sweeps * batch * length


def test_samples_that_have_finished_leave() -> None:
    """A slow one costs no evaluations of quick ones, but for a quarter of them that may stay."""
    strength = torch.tensor([1.5] + [0.0] * 7, dtype=torch.float64)
    z = normal(8, LENGTH, 2, seed=3)
    solver = jf.Solver(jf.Window(8), stopping=jf.Tolerance(1e-9))
    together = jf.solve(RaggedEchoBlock(), z, solver, strength)
    slow = jf.solve(RaggedEchoBlock(), z[:1], solver, strength[:1])
    quick = jf.solve(RaggedEchoBlock(), z[1:2], solver, strength[1:2])
    assert together.sample_sweeps.tolist() == [slow.sweeps] + [quick.sweeps] * 7
    assert quick.sweeps < slow.sweeps / 2
    left_over = (slow.sweeps - quick.sweeps) * LENGTH  # the slow one, whatever its runs
    assert together.token_evaluations <= 8 * quick.sweeps * 8 + left_over


def ragged_ledger(block: Any, slack: float) -> Any:
    """`flows.Ledger` for a block whose samples have fronts of their own."""

    class RaggedLedger(Ledger, FrontPerSample):
        def update_at(self, x: Tensor, z: Tensor, start: Tensor, size: int, end: int, cache: Any) -> Tensor:
            assert start.max() + size == end <= z.shape[1]
            for n, first in enumerate(start.tolist()):
                before, after = max(first - 1, 0), first + size - 1
                fresh = (cache.fed[n, :before] - x[n, :before]).abs() <= self.slack
                assert fresh.all(), f"stale keys before position {before} of row {n}"
                cache.fed[n, before:after] = x[n, before:after]
            return block.update_at(x, z, start, size, end, cache.inner)

        def take(self, cache: Any, rows: Tensor) -> Any:
            return SimpleNamespace(inner=block.take(cache.inner, rows), fed=cache.fed[rows])

        def join(self, caches: Sequence[Any]) -> Any:
            inner = block.join([cache.inner for cache in caches])
            return SimpleNamespace(inner=inner, fed=torch.cat([cache.fed for cache in caches]))

    return RaggedLedger(block, slack)


@cache
def small(guided: bool) -> Problem:
    flow = make_flow(image_size=6, patch_size=2, num_classes=3)
    return problem_of(flow, 1, 5, 4, torch.tensor([0, 2, -1, 1, 2]), GUIDE if guided else None)


@given(
    partition=st.one_of(st.just(jf.Whole()), st.builds(jf.Window, st.integers(1, 12))),
    guess=st.sampled_from(list(GUESSES.values())),
    correction=st.sampled_from([CORRECTIONS["plain"], CORRECTIONS["small chord"]]),
    exponent=st.floats(-11, -1),
    slots=st.none() | st.integers(1, 6),
    guided=st.booleans(),
)
@plans
def test_no_plan_relies_on_stale_or_missing_keys(
    partition: Any, guess: Any, correction: Any, exponent: float, slots: int | None, guided: bool
) -> None:
    problem, atol = small(guided), 10**exponent
    solver = jf.Solver(partition, guess(problem), jf.Tolerance(atol), correction(problem))
    solution = jf.solve(ragged_ledger(problem.block, atol), problem.z, solver, problem.labels, slots)
    assert (solution.status == jf.Status.CONVERGED).all()
    assert (solution.sample_sweeps <= problem.length).all()
    assert solution.sample_sweeps.max() <= solution.sweeps <= solution.sample_sweeps.sum()
    certified = jf.solve_certified(problem.block, problem.z, solver, problem.labels, slots=slots)
    assert problem.residual(certified.x) <= atol + 1e-12
    assert (certified.residual <= atol).all()


# ------------------------------------------------------------------------------------------------- continuous batching


class AtMost:
    """Wraps a block; fails where more than so many samples are in the network."""

    def __init__(self, block: Any, most: int) -> None:
        self.block, self.most, self.seen = block, most, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def update(self, x: Tensor, z: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        assert len(x) <= self.most
        self.seen = max(self.seen, len(x))
        return self.block.update(x, z, start, stop, cache)


class AtMostWithFronts(AtMost, FrontPerSample):
    """The same for a block with a front per sample."""

    def update_at(self, x: Tensor, z: Tensor, start: Tensor, size: int, end: int, cache: Any) -> Tensor:
        assert len(x) <= self.most
        self.seen = max(self.seen, len(x))
        return self.block.update_at(x, z, start, size, end, cache)

    def take(self, cache: Any, rows: Tensor) -> Any:
        return self.block.take(cache, rows)

    def join(self, caches: Sequence[Any]) -> Any:
        return self.block.join(caches)


def at_most(block: Any, most: int) -> AtMost:
    return (AtMostWithFronts if isinstance(block, FrontPerSample) else AtMost)(block, most)


def batched(name: str) -> Problem:
    found: dict[str, Callable[[], Problem]] = {
        "digits": digits,
        "guided digits": partial(digits, True),
        "small": partial(small, False),
        "small, guided": partial(small, True),
        "echo": partial(echo, True),
        "echo of one front": partial(echo, False),
    }
    return found[name]()


BATCHED = ["digits", "small", "small, guided", "echo", "echo of one front"]
BATCH_SOLVERS: dict[str, jf.Solver] = {
    "sequential": jf.Solver(jf.Sequential()),
    "whole": jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-11)),
    "window 4": jf.Solver(jf.Window(4), jf.Zeros(), jf.Tolerance(1e-11)),
    "window 24": jf.Solver(jf.Window(24), stopping=jf.Tolerance(1e-11)),
    "segments 3": jf.Solver(jf.Segments(3), stopping=jf.Tolerance(1e-11)),
    "gs-jacobi": jf.Solver(jf.Segments(3), jf.Zeros(), jf.MaxSweeps(2)),
    "uneven gs-jacobi": jf.Solver(jf.Segments(3), jf.Zeros(), jf.MaxSweeps([3, 1, 2])),
    "jacobi": jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(3)),
    "window of few sweeps": jf.Solver(jf.Window(4), stopping=jf.MaxSweeps(2)),
}


BATCHES = [(name, solver) for name in BATCHED if name != "digits" for solver in BATCH_SOLVERS]


@pytest.mark.parametrize(("name", "solver_name"), [*BATCHES, ("digits", "window 24"), ("guided digits", "whole")])
def test_slots_do_not_change_the_answers(name: str, solver_name: str) -> None:
    problem, solver = batched(name), BATCH_SOLVERS[solver_name]
    num = len(problem.z)
    solver = replace(solver, correction=random_chord(problem.z.shape[2], 0.1))
    at_once = jf.solve(problem.block, problem.z, solver, problem.labels)
    if solver.stopping.max_sweeps is None:
        assert error(at_once.x, problem.answer) < 1e-9
    for slots in (1, 2, 3, num, num + 3):
        block = at_most(problem.block, slots)
        solution = jf.solve(block, problem.z, solver, problem.labels, slots)
        assert block.seen == min(slots, num)
        assert error(solution.x, at_once.x) < 1e-9
        assert torch.equal(solution.status, at_once.status)
        assert solution.sweeps >= at_once.sweeps if slots < num else solution.sweeps == at_once.sweeps
        assert (solution.sample_sweeps <= solution.sweeps).all()
        assert solution.network_calls == solution.sweeps
        if slots >= num:
            assert torch.equal(solution.x, at_once.x)
            assert torch.equal(solution.sample_sweeps, at_once.sample_sweeps)
        if slots == 1:
            assert solution.sample_sweeps.sum() == solution.sweeps


def test_slots_take_the_guess_of_each_sample() -> None:
    """Samples that start at their answers are done in one sweep, wherever they come in."""
    problem = echo(ragged=True)
    known = [1, 3, 6]
    start = problem.z.clone()
    start[known] = problem.answer[known]
    for slots in (1, 2, 3, 7):
        solver = jf.Solver(jf.Whole(), Given(start), jf.Tolerance(1e-10))
        solution = jf.solve(problem.block, problem.z, solver, problem.labels, slots)
        assert (solution.sample_sweeps == 1).nonzero().flatten().tolist() == [1, 3, 4, 6]  # row 4 hears nothing
        assert error(solution.x, problem.answer) < 1e-9


def test_slots_are_taken_again_as_samples_finish() -> None:
    """Two slow samples are swept together, though no batch of two has both."""
    strength = torch.tensor([1.5, 0.0, 0.0, 0.0, 1.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    z = normal(8, LENGTH, 2, seed=3)
    solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-9))
    alone = jf.solve(RaggedEchoBlock(), z, solver, strength, slots=1).sample_sweeps
    assert alone.tolist() == [int(alone[0]), 1, 1, 1, int(alone[4]), 1, 1, 1]
    batches = jf.solve(EchoBlock(), z, solver, strength, slots=2)
    assert batches.sweeps == alone[0] + 1 + alone[4] + 1
    ragged = jf.solve(RaggedEchoBlock(), z, solver, strength, slots=2)
    assert torch.equal(ragged.sample_sweeps, alone)
    assert ragged.sweeps <= max(alone[0], alone[4]) + 6 < batches.sweeps
    assert error(ragged.x, batches.x) < 1e-7


@pytest.mark.parametrize("name", BATCHED)
def test_certificates_by_slots_are_the_same(name: str) -> None:
    problem = batched(name)
    num = len(problem.z)
    x = problem.answer + 1e-3 * normal(*problem.z.shape, seed=5)
    expected = (problem.g(x) - x).abs().amax(dim=(1, 2))
    x[2, 1, 0] = math.nan
    expected[2] = math.inf
    for slots in (None, 1, 2, 3, num, num + 3):
        block = at_most(problem.block, slots or num)
        certificate = jf.certify(block, problem.z, x, problem.labels, slots)
        assert torch.allclose(certificate, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("solver", BATCH_SOLVERS.values(), ids=BATCH_SOLVERS)
@pytest.mark.parametrize("name", ["small, guided", "echo", "echo of one front"])
def test_certified_solutions_by_slots_are_the_same(name: str, solver: jf.Solver) -> None:
    problem = batched(name)
    num = len(problem.z)
    at_once = jf.solve_certified(problem.block, problem.z, solver, problem.labels)
    for slots in (1, 2, 3, num, num + 3):
        block = at_most(problem.block, slots)
        solution = jf.solve_certified(block, problem.z, solver, problem.labels, slots=slots)
        assert error(solution.x, at_once.x) < 1e-9
        assert torch.equal(solution.status, at_once.status)
        assert torch.equal(solution.resolved_sequentially, at_once.resolved_sequentially)
        residual = (problem.g(solution.x) - solution.x).abs().amax(dim=(1, 2))
        assert torch.allclose(solution.residual, residual, rtol=1e-6, atol=1e-13)
        if solver.stopping.atol is None:  # nothing is solved again
            assert solution.network_calls == solution.sweeps + math.ceil(num / slots)


@pytest.mark.parametrize("strategy", ["sequential", "jacobi", "window:5", "gs-jacobi:3"])
def test_samples_are_the_same_by_any_batch_size(strategy: str) -> None:
    flow = make_flow(image_size=6, patch_size=2, num_classes=3)
    labels = torch.tensor([2, -1, 0, 1, 1])
    guidance = jf.Guidance(0.8, annealed=True, attn_temperature=0.7)
    draw = partial(
        jf.sample, flow, 5, labels, seed=3, strategy=strategy, guidance=guidance, progress=False,
        tolerance=None if strategy == "sequential" else 1e-11,
    )  # fmt: skip
    at_once = draw()
    assert error(at_once.images, Oracle(flow).decode(at_once.latents, labels, GUIDE)) < 1e-8
    for batch_size in (1, 2, 3, 5, 9):
        samples = draw(batch_size=batch_size)
        assert torch.equal(samples.latents, at_once.latents)
        assert error(samples.images, at_once.images) < 1e-8
        assert samples.certificate is not None
        assert (samples.certificate <= 1e-11).all()
        assert (samples.status == jf.Status.CONVERGED).all()


def test_samples_of_more_than_sixteen_batches_are_the_same() -> None:
    """So many batches go through a block before the next block."""
    flow = make_flow(image_size=6, patch_size=2, num_classes=3)
    draw = partial(jf.sample, flow, 40, torch.arange(40) % 3, strategy="window:5", tolerance=1e-10, progress=False)
    assert error(draw(batch_size=2).images, draw().images) < 1e-7


def test_samples_by_a_strategy_of_fitted_pieces_are_the_same_by_any_batch_size() -> None:
    flow = loaded("digits-p1")
    labels = torch.arange(4)
    guess, chord = fitted("digits-p1", 3)
    solver = jf.Solver(jf.Window(24), guess, jf.Tolerance(1e-8), chord)
    draw = partial(jf.sample, flow, 4, labels, strategy=jf.Strategy.uniform(solver, 4), progress=False)
    at_once = draw()
    assert error(at_once.images, Oracle(flow).decode(at_once.latents, labels)) < 1e-6
    for batch_size in (2, 3):
        samples = draw(batch_size=batch_size)
        assert error(samples.images, at_once.images) < 1e-6
        assert samples.certificate is not None
        assert (samples.certificate <= 1e-8).all()


@pytest.mark.parametrize("block", [EchoBlock(), RaggedEchoBlock()], ids=["one front", "ragged"])
def test_negative_slots_give_no_made_up_answer(block: Any) -> None:
    with pytest.raises(ValueError, match="slots"):
        jf.solve(block, normal(3, 5, 1), jf.Solver(), slots=-1)


def test_no_samples_have_no_residual() -> None:
    none = torch.zeros(0, 5, 1)
    assert jf.solve(EchoBlock(), none, jf.Solver()).x.shape == none.shape
    assert jf.certify(EchoBlock(), none, none).shape == (0,)
    assert jf.solve_certified(EchoBlock(), none, jf.Solver()).x.shape == none.shape


# ------------------------------------------------------------------------------------ what a block with fronts must do

FRONTED = ["digits", "guided digits", "small", "small, guided"]


def row(problem: Problem, x: Tensor, n: int, history: Sequence[tuple[int, int]]) -> Tensor:
    """The last update of a history of (start, stop) of sample n, on a cache of its own."""
    z, labels = problem.rows(slice(n, n + 1))
    cache = problem.block.init_cache(z, labels)
    for k, (start, stop) in enumerate(history):
        g = problem.block.update(x[k, n : n + 1], z, start, stop, cache)
    return g[0]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", FRONTED)
@torch.no_grad()
def test_update_at_is_update_row_by_row(name: str, size: int) -> None:
    """And leaves the keys that `update` leaves: the last step reads them all."""
    problem = batched(name)
    num, length, channels = problem.z.shape
    x = normal(4, num, length, channels, seed=7)
    generator = torch.Generator().manual_seed(size)
    cache = problem.block.init_cache(problem.z, problem.labels)
    problem.block.update(x[0], problem.z, 0, length, cache)
    history: list[list[tuple[int, int]]] = [[(0, length)] for _ in range(num)]
    first = 0 if size > 1 else 1
    for k in (1, 2):
        start = torch.randint(first, length - size + 1, (num,), generator=generator)
        start[0], start[1] = (first, length - size) if k == 1 else (1, first)
        end = int(start.max()) + size
        g = problem.block.update_at(x[k], problem.z, start, size, end, cache)
        assert g.shape == (num, size, channels)
        for n in range(num):
            history[n].append((int(start[n]), int(start[n]) + size))
            assert error(g[n], row(problem, x, n, history[n])) < 1e-12
    g = problem.block.update(x[3], problem.z, length - 1, length, cache)
    for n in range(num):
        assert error(g[n], row(problem, x, n, [*history[n], (length - 1, length)])) < 1e-12


@pytest.mark.parametrize("name", FRONTED)
@torch.no_grad()
def test_update_at_of_one_token_may_be_of_the_first(name: str) -> None:
    problem = batched(name)
    x = normal(*problem.z.shape, seed=3)
    cache = problem.block.init_cache(problem.z, problem.labels)
    problem.block.update(x, problem.z, 0, 4, cache)
    start = torch.arange(len(x)) % 4
    g = problem.block.update_at(x, problem.z, start, 1, 4, cache)
    expected = problem.g(x)
    for n, t in enumerate(start.tolist()):
        assert error(g[n, 0], expected[n, t]) < 1e-11


@pytest.mark.parametrize("guide", [None, GUIDE], ids=["plain", "guided"])
@torch.no_grad()
def test_a_large_batch_is_updated_as_a_small_one(guide: Guide | None) -> None:
    """And its keys are kept: the last entries are computed from those of all tokens."""
    num = 60
    problem = problem_of(loaded("digits-p1"), 2, num, 6, torch.arange(num) % 11 - 1, guide, solved=False)
    x = normal(*problem.z.shape, seed=3)
    expected = problem.g(x)
    cache = problem.block.init_cache(problem.z, problem.labels)
    assert error(problem.block.update(x, problem.z, 0, 64, cache), expected) < 1e-11
    assert error(problem.block.update(x, problem.z, 62, 64, cache), expected[:, 62:]) < 1e-11
    start = torch.arange(num) % 30
    ragged = problem.block.update_at(x, problem.z, start, 34, 63, cache)
    for n, t in enumerate(start.tolist()):
        assert error(ragged[n], expected[n, t : t + 34]) < 1e-11


@pytest.mark.parametrize("name", FRONTED)
@torch.no_grad()
def test_update_at_of_all_is_the_map(name: str) -> None:
    problem = batched(name)
    num, length, _ = problem.z.shape
    cache = problem.block.init_cache(problem.z, problem.labels)
    x = normal(*problem.z.shape, seed=3)
    g = problem.block.update_at(x, problem.z, torch.zeros(num, dtype=torch.int64), length, length, cache)
    assert error(g, problem.g(x)) < 1e-11


@pytest.mark.parametrize("name", FRONTED)
@torch.no_grad()
def test_caches_that_are_taken_and_joined_are_those_of_their_samples(name: str) -> None:
    problem = batched(name)
    block, length = problem.block, problem.length
    half = length // 2
    x = normal(2, *problem.z.shape, seed=9)

    def filled(rows: Tensor) -> Any:
        z, labels = problem.rows(rows)
        cache = block.init_cache(z, labels)
        block.update(x[0, rows], z, 0, half, cache)
        return cache

    def goes_on(cache: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All together, then each at a token of its own."""
        z, _ = problem.rows(rows)
        shared = block.update(x[1, rows], z, half, half + 2, cache)
        start = torch.arange(len(rows)) % 2 + half - 1
        return shared, block.update_at(x[1, rows], z, start, 2, int(start.max()) + 2, cache)

    def same(cache: Any, rows: Tensor) -> None:
        for got, expected in zip(goes_on(cache, rows), goes_on(filled(rows), rows), strict=True):
            assert error(got, expected) < 1e-12

    left, right, last = torch.tensor([4, 0]), torch.tensor([2, 1]), torch.tensor([3])
    everyone = torch.arange(len(problem.z))
    same(block.take(filled(everyone), left), left)
    same(block.join([filled(left), filled(right), filled(last)]), torch.cat((left, right, last)))
    kept = block.take(filled(everyone), torch.tensor([1, 3]))
    same(block.join([kept, filled(left)]), torch.tensor([1, 3, 4, 0]))
    joined = block.join([filled(left), filled(right)])
    same(block.take(joined, torch.tensor([3, 1])), torch.tensor([1, 0]))


def test_caches_without_labels_are_taken_and_joined_too() -> None:
    """Guidance of a flow away from itself at another temperature; a batch whose rows have no class."""
    problem = small(True)
    for block in (problem.block, problem.block.block):
        solver = jf.Solver(jf.Window(3), stopping=jf.Tolerance(1e-12))
        at_once = jf.solve(block, problem.z, jf.Solver(jf.Sequential()))
        for slots in (1, 2, 3):
            assert error(jf.solve(block, problem.z, solver, slots=slots).x, at_once.x) < EXACT


# ----------------------------------------------------------------------------------------------------------------- fits


def test_fit_guess_finds_a_causal_linear_map() -> None:
    kernel, shift = 0.5 * normal(4, 2, 2, seed=1), normal(20, 2, seed=2)
    z = normal(200, 20, 2, seed=3) + normal(20, 2, seed=4)
    x = torch.from_numpy(convolved(kernel.numpy(), z.numpy(), delay=0)) + shift
    for width in (3, 6):
        guess = fit_guess(x, z, width)
        assert guess.kernel.shape == (width + 1, 2, 2)
        assert error(guess.kernel[:4], kernel) < 3e-3
        assert width == 3 or guess.kernel[4:].abs().max() < 3e-3
        assert error(guess(z), x) < 2e-2
    fewer = fit_guess(x, z, 1)
    assert error(fewer.kernel, kernel[:2]) < 0.2
    assert (fewer(z) - x).square().mean() > 100 * (guess(z) - x).square().mean()


class LinearBlock(EchoBlock):
    """x_t = z_t + sum over d of kernel[d - 1] x_(t-d)."""

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel

    def whole(self, x: Tensor, z: Tensor, cache: Tensor) -> Tensor:
        return z + torch.from_numpy(convolved(self.kernel.numpy(), x.numpy(), delay=1))

    def answer(self, z: Tensor) -> Tensor:
        x = z.clone()
        for t in range(z.shape[1]):
            for d in range(1, min(len(self.kernel), t) + 1):
                x[:, t] += x[:, t - d] @ self.kernel[d - 1].T
        return x

    def inverse(self, width: int) -> Tensor:
        """`width` entries after the identity of (I - Gamma)^-1, whose columns are the answers to impulses."""
        channels = self.kernel.shape[1]
        impulses = torch.zeros(channels, width + 1, channels, dtype=torch.float64)
        impulses[:, 0] = torch.eye(channels)
        return self.answer(impulses)[:, 1:].permute(1, 2, 0)


LINEAR = LinearBlock(torch.stack((0.35 * normal(2, 2, seed=1), 0.15 * normal(2, 2, seed=2))))


@pytest.mark.parametrize("partition", [jf.Whole(), jf.Segments(1), jf.Window(48)], ids=str)
def test_the_chord_of_a_linear_map_is_its_inverse(partition: Any) -> None:
    """One step solves it from anywhere, and a second sees that nothing moves."""
    z = normal(3, 48, 2, seed=5)
    solver = jf.Solver(partition, jf.Zeros(), jf.Tolerance(1e-11), jf.Chord(LINEAR.inverse(47)))
    solution = jf.solve(LINEAR, z, solver)
    assert error(solution.x, LINEAR.answer(z)) < EXACT
    assert solution.sweeps == 2
    assert jf.solve(LINEAR, z, replace(solver, correction=jf.Plain())).sweeps > 20


@pytest.mark.parametrize("known", [0, 16], ids=["from zeros", "from an answer in part"])
@pytest.mark.parametrize("partition", [jf.Segments(6), jf.Window(8)], ids=str)
def test_the_chord_of_a_linear_map_solves_every_run_at_once(partition: Any, known: int) -> None:
    """A run starts with larger residuals than the one before it ended with: no sign that the chord does not fit."""
    z = normal(3, 48, 2, seed=5)
    start = torch.zeros_like(z)
    start[:, :known] = LINEAR.answer(z)[:, :known]
    solver = jf.Solver(partition, Given(start), jf.Tolerance(1e-11), jf.Chord(LINEAR.inverse(47)))
    solution = jf.solve(LINEAR, z, solver)
    assert error(solution.x, LINEAR.answer(z)) < EXACT
    assert solution.sweeps <= 2 * 6


def test_fit_chord_solves_a_banded_linear_map_in_few_sweeps() -> None:
    z, held_out = normal(16, 48, 2, seed=6), normal(4, 48, 2, seed=7)
    answer = LINEAR.answer(held_out)
    for guess in (jf.Latent(), fit_guess(LINEAR.answer(z), z, 4)):
        guess = replace(guess, shift=guess.shift[:48]) if isinstance(guess, jf.CausalLinear) else guess
        chord = fit_chord(LINEAR, LINEAR.answer(z), z, guess)
        assert error(chord.kernel[:3], LINEAR.inverse(3)) < 0.1
        solver = jf.Solver(jf.Whole(), guess, jf.MaxSweeps(5))
        after = {
            correction: error(jf.solve(LINEAR, held_out, replace(solver, correction=correction)).x, answer)
            for correction in (jf.Plain(), chord)
        }
        assert after[chord] < 1e-4
        assert after[chord] < after[jf.Plain()] / 100
        to_tolerance = replace(solver, stopping=jf.Tolerance(1e-6), correction=chord)
        assert jf.solve(LINEAR, held_out, to_tolerance).sweeps <= 9


def test_fit_chord_of_a_map_that_feels_nothing_is_none() -> None:
    z = normal(4, 12, 2)
    block = LinearBlock(torch.zeros(1, 2, 2, dtype=torch.float64))
    assert fit_chord(block, z, z, jf.Latent(), width=5).kernel.abs().max() == 0
    assert fit_chord(block, z, z, jf.Zeros(), width=5).kernel.abs().max() < 1e-12


def test_fits_do_not_change_what_they_are_given_and_repeat() -> None:
    z = normal(8, 20, 2)
    x = LINEAR.answer(z)
    kept = x.clone(), z.clone()
    guess = fit_guess(x, z, 3)
    assert fit_guess(x, z, 3) == guess
    assert fit_chord(LINEAR, x, z, guess, width=3) == fit_chord(LINEAR, x, z, guess, width=3)
    assert torch.equal(x, kept[0])
    assert torch.equal(z, kept[1])


def test_a_fitted_chord_saves_sweeps_of_the_tough_block() -> None:
    """At latents that it was not fitted to."""
    flow = jf.load("fashion-p2")
    guess, chord = fitted("fashion-p2", 7)
    z, labels = latents(flow, 8, seed=200) * flow.var.sqrt(), torch.arange(8)
    sweeps = {}
    for start in (jf.Latent(), guess):
        for correction in (jf.Plain(), chord):
            solver = jf.Solver(jf.Whole(), start, jf.Tolerance(1e-3), correction)
            solution = jf.solve(flow.blocks[7], z, solver, labels)
            assert (solution.status == jf.Status.CONVERGED).all()
            sweeps[start, correction] = solution.sample_sweeps.sum().item()
    assert sweeps[guess, jf.Plain()] < sweeps[jf.Latent(), jf.Plain()]
    assert sweeps[jf.Latent(), chord] < 0.9 * sweeps[jf.Latent(), jf.Plain()]
    assert sweeps[guess, chord] < 0.9 * sweeps[guess, jf.Plain()]
    assert sweeps[guess, chord] < sweeps[jf.Latent(), chord]
    certified = jf.solve_certified(flow.blocks[7], z, jf.Solver(jf.Whole(), guess, correction=chord), labels)
    assert (certified.residual <= 1e-3).all()
    residual = Oracle(flow).g(7, certified.x, z, labels) - certified.x
    assert residual.abs().max() < 1e-3 + 1e-4  # float32 rounds, and the oracle does not


# -------------------------------------------------------------------------------- a tolerance of the certificate's own


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize(
    "solver",
    [
        jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-2)),
        jf.Solver(jf.Window(8), jf.Zeros(), jf.Tolerance(1e-1)),
        jf.Solver(jf.Segments(4), stopping=jf.Tolerance(1e-2)),
        jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(5)),
        jf.Solver(jf.Segments(4), stopping=jf.MaxSweeps(2)),
        jf.Solver(jf.Window(8), stopping=jf.Tolerance(1e-2) | jf.MaxSweeps(2)),
        jf.Solver(jf.Sequential()),
    ],
    ids=str,
)
def test_a_certificate_may_ask_for_more_than_the_solver(solver: jf.Solver, slots: int | None) -> None:
    problem = digits()
    raw = jf.solve(problem.block, problem.z, solver, problem.labels)
    above = jf.certify(problem.block, problem.z, raw.x, problem.labels) > 1e-8
    assert above.all() or isinstance(solver.partition, jf.Sequential)
    solution = jf.solve_certified(problem.block, problem.z, solver, problem.labels, slots=slots, tolerance=1e-8)
    assert (solution.status == jf.Status.CONVERGED).all()
    assert (solution.residual <= 1e-8).all()
    assert problem.residual(solution.x) <= 1e-8 + 1e-13
    assert error(solution.x, problem.answer) < 1e-6
    if solver.stopping.max_sweeps is None or solver.stopping.atol is None:  # resumed, not begun anew
        assert not solution.resolved_sequentially.any()
    else:
        missed = raw.status == jf.Status.MAX_SWEEPS
        assert missed.any()
        assert solution.resolved_sequentially[missed].all()


def test_a_certificate_may_ask_for_less_than_the_solver() -> None:
    """Sweeps that ran out short of the solver's tolerance came within the one that counts."""
    problem = digits()
    solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-9) | jf.MaxSweeps(14))
    raw = jf.solve(problem.block, problem.z, solver, problem.labels)
    assert (raw.status == jf.Status.MAX_SWEEPS).any()
    solution = jf.solve_certified(problem.block, problem.z, solver, problem.labels, tolerance=1e-2)
    assert (solution.status == jf.Status.CONVERGED).all()
    assert not solution.resolved_sequentially.any()
    assert torch.equal(solution.x, raw.x)
    assert 1e-9 < solution.residual.max() <= 1e-2


def test_only_samples_above_the_tolerance_are_solved_again() -> None:
    problem = digits()
    start = problem.answer.clone()
    start[[1, 4]] = problem.z[[1, 4]]
    solver = jf.Solver(jf.Whole(), Given(start), jf.Tolerance(1e-2))
    raw = jf.solve(problem.block, problem.z, solver, problem.labels)
    solution = jf.solve_certified(problem.block, problem.z, solver, problem.labels, tolerance=1e-8)
    more = solution.sample_sweeps - raw.sample_sweeps
    assert (more > 0).tolist() == [False, True, False, False, True, False]
    assert (solution.residual <= 1e-8).all()
    assert not solution.resolved_sequentially.any()


@pytest.mark.parametrize("partition", [jf.Sequential(), jf.Whole(), jf.Window(8)], ids=str)
def test_a_tolerance_below_rounding_is_told(partition: Any) -> None:
    flow = jf.load("digits-p1")
    z, labels = latents(flow, 3), torch.arange(3)
    solver = jf.Solver(partition, stopping=jf.Tolerance(1e-3))
    solution = jf.solve_certified(flow.blocks[3], z, solver, labels, tolerance=1e-12)
    above = solution.residual > 1e-12
    assert above.any()
    assert torch.equal(solution.status == jf.Status.ROUNDING, above)
    assert (solution.residual < 1e-5).all()


def test_without_a_certificate_there_is_nothing_to_hold_against_it() -> None:
    problem = digits()
    for solver in (jf.Solver(), jf.Solver(stopping=jf.MaxSweeps(4))):
        swept = jf.solve_certified(problem.block, problem.z, solver, problem.labels, False)
        same = jf.solve_certified(problem.block, problem.z, solver, problem.labels, False, tolerance=1e-9)
        assert torch.equal(same.x, swept.x)
        assert torch.equal(same.status, swept.status)
        assert torch.equal(same.residual, swept.residual)
        assert not same.resolved_sequentially.any()


@pytest.mark.parametrize(("low", "most"), [(False, 1e-4), (True, 5e-2)])
def test_a_batch_that_goes_through_in_parts_is_as_one_by_one(low: bool, most: float) -> None:
    """More tokens than are taken at a time, of the trained model, and keys that all parts have left in one cache."""
    flow, num = jf.load("fashion-p2"), 40
    block, length = flow.blocks[3], flow.config.num_tokens
    z, x = (normal(num, length, 4, seed=seed).float() for seed in (0, 1))
    labels = torch.arange(num) % 10

    def fresh(rows: slice) -> Any:
        cache = block.init_cache(z[rows], labels[rows])
        return block.lower(cache) if low else cache

    with torch.no_grad():
        cache = fresh(slice(num))
        together = block.update(x, z, 0, length, cache)
        alone = [block.update(x[i : i + 1], z[i : i + 1], 0, length, fresh(slice(i, i + 1))) for i in range(num)]
        after = block.update(x, z, 150, length, cache)
    assert error(together, torch.cat(alone)) <= most
    assert error(after, together[:, 150:]) <= most
