"""Solves a fixed-point problem: an attempt, its certificate, and new attempts at the samples that fall short."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.blocks.base import Block, is_pure
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point.attempt import attempt
from jacobiflow.fixed_point.guess import WarmStart
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE, CertifyMode, SolveOptions
from jacobiflow.fixed_point.partition import Sequential
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solution import Solution, Status
from jacobiflow.fixed_point.solver import Solver
from jacobiflow.utils.checks import check_kind, check_positive
from jacobiflow.utils.deprecation import renamed_arguments

_RESUME_FACTOR = 0.5
"""Samples are resumed to this share of the tolerance; at the tolerance itself they would often miss it again."""
_SWEEP_FACTOR = 2.0
"""Residuals up to this multiple of the tolerance come from sweeps, which leave up to 1.5, and not from rounding."""
_NUM_PROBES = 4
"""Samples whose exact solves measure the rounding of a block."""
_ROUNDING_FACTOR = 4.0
"""Samples of a block are assumed to have relative rounding within this factor of each other."""


@renamed_arguments(slots="batch_size", certificate="certify")
def solve(
    block: Block, z: Tokens, solver: Solver, context: Tensor | Context | None = None, *,
    tolerance: float | None = DEFAULT_TOLERANCE, certify: CertifyMode = True, batch_size: int | None = None,
    time_limit: float | None = None,
) -> Solution:  # fmt: skip
    """Solves x = g(x) for the inverse of a block, by sweeps x <- g(x) over runs of tokens, and certifies each sample.

    A sweep evaluates g on the run [front, stop) that the partition chooses. Then the front passes the leading tokens
    that the sweep changed by at most the tolerance, and one more, which was computed from final ones (Proposition 1 of
    the paper): T sweeps always suffice. Under `Stopping(J)` a token is passed after J sweeps at the latest. A value
    that overflows is set back to the guess. If every run is one token, the block's `sequential_inverse` is called
    instead.

    If the partition's run slides (`Whole`, `Window`), the solver has no stopping rule, and the block is an
    `AttentionBlock`, then each sample has a front of its own. Else the batch shares one front, which waits for the
    slowest sample.

    One more pass measures the residual of each sample. A sample above the tolerance is resumed from its answer, without
    stopping rules, to half of the tolerance. If it is still above, or not finite, it is solved token by token. Without
    certificates, samples that ran out of sweeps are solved token by token.

    An exact solve leaves a residual as well: the rounding of the network. If more than four samples are to be solved
    token by token, the four with the largest residuals go first. The smallest |g(x) - x| / |x| that they leave is the
    relative rounding of the block. Other samples up to four times it keep their answers, as `Status.ROUNDING`.

    Args:
        block: Gives g.
        z: Input of the block in its causal order, float32 or float64.
        solver: The partition, guess and stopping.
        context: One row for each sample (labels, for example).
        tolerance: The largest residual allowed. With `None` only the solver's stopping rules end the sweeps, and
            nothing is promised.
        certify: `False` leaves out the pass that measures. "always" measures exact answers too. Without it the
            residual of an exact answer is measured if the block is not `is_pure`. Else it is 0 by construction; or,
            if that is above a tolerance other than 0, the distance of the largest entry of x to the next number.
        batch_size: Samples that are swept at a time, all by default. The next ones enter as others finish.
        time_limit: Seconds after which TimeoutError is raised, between two sweeps.

    Example:
        >>> block, z = jf.load("digits-p1").blocks[0], torch.ones(2, 64, 1)
        >>> solution = jf.solve(block, z, jf.Solver(jf.Window(16)), tolerance=1e-3)
        >>> bool((solution.residual <= 1e-3).all()), solution.sweeps < 64
        (True, True)
    """
    seconds = math.inf if time_limit is None else check_positive("time_limit", time_limit)
    options = SolveOptions(tolerance, certify, batch_size, time.perf_counter() + seconds)
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    return solve_problem(Problem.checked(block, z, context), solver, options)


def solve_problem(problem: Problem, solver: Solver, options: SolveOptions) -> Solution:
    """Solves a problem as `solve` does."""
    started = time.perf_counter()
    tolerance = options.tolerance
    solution = attempt(problem, solver, options)
    # Without a look at `solution.exact`, which waits for a GPU.
    is_exact = solver.partition.token_by_token(problem.num_tokens)
    is_known = is_exact and is_pure(problem.block)
    if options.certify == "always" or (options.certify and not is_known):
        solution = _certify(problem, solution, options)
    elif options.certify and tolerance:
        solution = replace(solution, residual=_least_rounding(solution, tolerance))
    if not is_exact:
        solution = _solve_rejected(problem, solver, options, solution)
    if tolerance is not None:  # NONFINITE is a larger status than ROUNDING
        status = torch.where(solution.residual > tolerance, solution.status.clamp(min=Status.ROUNDING), solution.status)
        solution = replace(solution, status=status)
    return replace(solution, seconds=time.perf_counter() - started)


def _solve_rejected(problem: Problem, solver: Solver, options: SolveOptions, solution: Solution) -> Solution:
    """Solves samples again that are above the tolerance, or not finite."""
    tolerance, rounding = options.tolerance, 0.0
    if options.certify and tolerance is not None:
        solution = _resume(problem, solver, options, solution, tolerance)
        solution, rounding = _probe_rounding(problem, options, solution, tolerance)
    rows = (solution.status == Status.NONFINITE) & ~solution.exact
    if tolerance is not None:
        rows |= _is_above(solution, tolerance, rounding)
    return _solve_sequentially(problem, options, solution, rows)


def _resume(problem: Problem, solver: Solver, options: SolveOptions, solution: Solution, tolerance: float) -> Solution:
    """Solves samples that ended above the tolerance again, from their answers."""
    # The residual tells more than the number of sweeps.
    status = solution.status.masked_fill(solution.status == Status.MAX_SWEEPS, Status.CONVERGED)
    solution = replace(solution, status=status)
    rows = _is_above(solution, tolerance)
    resumed = Solver(solver.partition, WarmStart(solution.x[rows]), tolerance_factor=_RESUME_FACTOR)
    return _solve_again(problem, resumed, options, solution, rows)


def _probe_rounding(
    problem: Problem, options: SolveOptions, solution: Solution, tolerance: float
) -> tuple[Solution, float]:
    """Solves some of many samples token by token; returns the relative rounding of the block too, 0 if unknown."""
    is_above = _is_above(solution, tolerance)
    if int(is_above.sum()) <= _NUM_PROBES:
        return solution, 0.0
    probes = torch.zeros_like(is_above)
    probes[solution.residual.masked_fill(~is_above, -torch.inf).topk(_NUM_PROBES).indices] = True
    solution = _solve_sequentially(problem, options, solution, probes)
    # NaN if one of them overflowed: then no residual compares as rounding.
    return solution, float((solution.residual[probes] / _max_abs(solution.x[probes])).min())


def _least_rounding(solution: Solution, tolerance: float) -> Float[Tensor, " b"]:
    """The residuals of exact answers: the distance of x to the next number if that is above the tolerance, else 0."""
    spacing = torch.finfo(solution.x.dtype).eps * _max_abs(solution.x)
    return torch.where(spacing > tolerance, spacing, solution.residual)


def _is_above(solution: Solution, tolerance: float, rounding: float = 0.0) -> Bool[Tensor, " b"]:
    """The finite samples, not exact, that are above the tolerance by more than the relative rounding."""
    status, residual = solution.status, solution.residual
    above = (status == Status.MAX_SWEEPS) | (residual > tolerance)
    is_rounding = residual > _SWEEP_FACTOR * tolerance
    is_rounding &= residual <= _ROUNDING_FACTOR * rounding * _max_abs(solution.x)
    return above & ~solution.exact & (status != Status.NONFINITE) & ~is_rounding


def _solve_sequentially(
    problem: Problem, options: SolveOptions, solution: Solution, rows: Bool[Tensor, " b"]
) -> Solution:
    """Solves samples token by token, and notes that they needed it."""
    solution = _solve_again(problem, Solver(Sequential()), options, solution, rows)
    return replace(solution, used_fallback=solution.used_fallback | rows)


def _solve_again(
    problem: Problem, solver: Solver, options: SolveOptions, solution: Solution, rows: Bool[Tensor, " b"]
) -> Solution:
    if not rows.any():
        return solution
    part = problem[rows]
    better = attempt(part, solver, options)
    return solution.merge(rows, _certify(part, better, options) if options.certify else better)


def _certify(problem: Problem, solution: Solution, options: SolveOptions) -> Solution:
    """The solution with its residuals and log-determinants, and with the cost of measuring them."""
    residual, log_det = problem.residual(solution.x, options.batch_size)
    return replace(
        solution,
        residual=residual,
        log_det=log_det,
        network_calls=solution.network_calls + len(problem.batches(options.batch_size)),
        token_evaluations=solution.token_evaluations + problem.z.shape[:2].numel(),
    )


def _max_abs(x: Tokens) -> Float[Tensor, " b"]:
    return x.abs().amax(dim=(1, 2))
