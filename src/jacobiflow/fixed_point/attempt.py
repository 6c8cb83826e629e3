"""One attempt at a fixed-point problem: by the exact loop, or by sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import AttentionBlock, TokensLogDet, no_gradients
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import UnsupportedError
from jacobiflow.fixed_point.batching import sweep
from jacobiflow.fixed_point.cuda_graphs import TokenLoop
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solution import Solution, Status
from jacobiflow.fixed_point.solver import Solver

ExactInverse = Callable[..., TokensLogDet]
"""z, context, batch size -> x and log|det dx/dz|."""


def attempt(problem: Problem, solver: Solver, options: SolveOptions) -> Solution:
    """Solves a problem once, as its solver says, without a certificate.

    Raises ValueError if the solver does not fit the problem.
    """
    solver.check(problem.num_tokens, options.tolerance)
    solution, obstacle = None, None
    with no_gradients(problem.block):
        for backend, inverse in _exact_inverses(problem, solver):
            try:
                x, log_det = inverse(problem.z.detach(), problem.context, batch_size=options.batch_size)
            except UnsupportedError as error:
                obstacle = obstacle or str(error)
            else:
                options.check_time()
                solution = _exact_solution(problem, options, x, log_det, backend)
                break
        if solution is None:
            solution = _solve_by_sweeps(problem, solver, options)
    # Clones made outside inference mode, so that autograd takes the tensors.
    tensors: Any = {name: value.clone() for name, value in vars(solution).items() if isinstance(value, Tensor)}
    return replace(solution, **tensors, obstacle=obstacle)


def _exact_inverses(problem: Problem, solver: Solver) -> Iterator[tuple[str, ExactInverse]]:
    """Yields functions that solve all tokens one after the other, with their names, if the solver goes token by token.

    Each may raise UnsupportedError. The last resort are sweeps of one token.
    """
    block: Any = problem.block
    if not len(problem) or not solver.partition.token_by_token(problem.num_tokens):
        return
    yield "native", getattr(block, "sequential_inverse", _no_inverse)
    if problem.z.is_cuda and isinstance(block, AttentionBlock):
        yield "graphs", TokenLoop(block)


def _no_inverse(z: Tokens, context: Context, batch_size: int | None) -> TokensLogDet:
    raise UnsupportedError("the block has no sequential_inverse")


def _exact_solution(
    problem: Problem, options: SolveOptions, x: Tokens, log_det: Float[Tensor, " b"], backend: str
) -> Solution:
    """Returns the solution of an exact loop, which counts as a sweep for each token and batch."""
    failed = ~x.isfinite().all(dim=(1, 2))
    num_tokens, num_batches = problem.num_tokens, len(problem.batches(options.batch_size))
    return Solution(
        x=x,
        status=torch.where(failed, Status.NONFINITE, Status.CONVERGED),
        residual=torch.zeros_like(log_det).masked_fill(failed, torch.inf),
        log_det=log_det,
        exact=torch.ones_like(failed),
        used_fallback=torch.zeros_like(failed),
        sample_sweeps=torch.full_like(failed, num_tokens, dtype=torch.int64),
        sweeps=num_tokens * num_batches,
        network_calls=num_tokens * num_batches,
        token_evaluations=num_tokens * len(x),
        backend=backend,
    )


def _solve_by_sweeps(problem: Problem, solver: Solver, options: SolveOptions) -> Solution:
    result = sweep(problem, solver, options)
    x, progress = result.x, result.progress
    failed = ~x.isfinite().all(dim=(1, 2)) | progress.nonfinite
    status = torch.where(progress.hit_max_sweeps, Status.MAX_SWEEPS, Status.CONVERGED)
    return Solution(
        x=x,
        status=status.masked_fill(failed, Status.NONFINITE),
        residual=progress.residual.masked_fill(failed, torch.inf),
        log_det=torch.full_like(progress.residual, torch.nan),
        exact=progress.exact,
        used_fallback=torch.zeros_like(failed),
        sample_sweeps=progress.sweeps,
        sweeps=result.sweeps,
        network_calls=result.sweeps,
        token_evaluations=result.token_evaluations,
        backend="sweeps",
    )
