"""One attempt at a fixed-point problem: the token-by-token call of its block, or sweeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jacobiflow.blocks.base import TokensLogDet, no_gradients, supports
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError, UnsupportedError
from jacobiflow.fixed_point.batching import sweep
from jacobiflow.fixed_point.cuda_graphs import TokenLoop
from jacobiflow.fixed_point.guess import WarmStart
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.partition import Whole
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solution import Solution, Status
from jacobiflow.fixed_point.solver import MaxSweeps, Solver


def attempt(problem: Problem, solver: Solver, options: SolveOptions) -> Solution:
    """Solves a problem once, as its solver says, without a certificate."""
    started = time.perf_counter()
    solver.check(*problem.z.shape[1:])
    if solver.bf16_sweeps and not supports(problem.block, "has_bf16"):
        name = type(problem.block).__name__
        raise InputValueError(f"bf16_sweeps={solver.bf16_sweeps}: {name} has no bfloat16 network; give 0")
    is_exact = len(problem) and solver.partition.token_by_token(problem.num_tokens)
    with no_gradients(problem.block):
        solution = (_solve_exactly if is_exact else _solve_by_sweeps)(problem, solver, options)
    # Clones made outside inference mode, so that autograd takes the tensors.
    tensors: Any = {name: value.clone() for name, value in vars(solution).items() if isinstance(value, Tensor)}
    return replace(solution, **tensors, seconds=time.perf_counter() - started)


def _solve_exactly(problem: Problem, solver: Solver, options: SolveOptions) -> Solution:
    """Solves token by token: by the block's `sequential_inverse`, else by CUDA graphs, else by sweeps of one token."""
    block: Any = problem.block
    try:
        if not hasattr(block, "sequential_inverse"):
            raise UnsupportedError(f"{type(block).__name__} has no sequential_inverse")
        return _solve_in_batches(problem, options, block.sequential_inverse, "native")
    except UnsupportedError as error:
        obstacle = str(error)
    if problem.z.is_cuda and supports(block, "graph_safe"):
        solution = _solve_in_batches(problem, options, TokenLoop(block), "graphs")
    else:
        solution = _solve_by_sweeps(problem, solver, options)
    return replace(solution, obstacle=obstacle)


def _solve_in_batches(
    problem: Problem, options: SolveOptions, inverse: Callable[[Tokens, Context], TokensLogDet], backend: str
) -> Solution:
    """Returns the solution that calls of `inverse` give. A call counts as a sweep for each token."""
    answers = []
    for _, part in problem.batches(options.batch_size):
        answers.append(inverse(part.z, part.context))
        options.check_time()
    x, log_det = map(torch.cat, zip(*answers, strict=True))
    failed = ~x.isfinite().all(dim=(1, 2))
    num_tokens = problem.num_tokens
    return Solution(
        x=x,
        status=torch.where(failed, Status.NONFINITE, Status.CONVERGED),
        residual=torch.zeros_like(log_det).masked_fill(failed, torch.inf),
        log_det=log_det,
        exact=torch.ones_like(failed),
        used_fallback=torch.zeros_like(failed),
        sample_sweeps=torch.full_like(failed, num_tokens, dtype=torch.int64),
        sweeps=num_tokens * len(answers),
        network_calls=num_tokens * len(answers),
        token_evaluations=num_tokens * len(x),
        seconds=0.0,
        backend=backend,
    )


def _solve_by_sweeps(problem: Problem, solver: Solver, options: SolveOptions) -> Solution:
    """Solves by sweeps, the first of them in bfloat16 if the solver says so."""
    first = None
    if solver.bf16_sweeps:
        coarse = replace(solver, partition=Whole(), stopping=MaxSweeps(solver.bf16_sweeps))
        first = sweep(problem, coarse, options, in_bf16=True)
        solver = replace(solver, guess=WarmStart(first.x))
    result = sweep(problem, solver, options)
    x, fronts = result.x, result.fronts
    failed = ~x.isfinite().all(dim=(1, 2)) | fronts.nonfinite
    status = torch.where(fronts.hit_max_sweeps, Status.MAX_SWEEPS, Status.CONVERGED)
    sweeps = result.sweeps + (0 if first is None else first.sweeps)
    return Solution(
        x=x,
        status=status.masked_fill(failed, Status.NONFINITE),
        residual=fronts.residual.masked_fill(failed, torch.inf),
        log_det=torch.full_like(fronts.residual, torch.nan),
        exact=fronts.exact,
        used_fallback=torch.zeros_like(failed),
        sample_sweeps=fronts.sweeps if first is None else fronts.sweeps + first.fronts.sweeps,
        sweeps=sweeps,
        network_calls=sweeps,
        token_evaluations=result.token_evaluations + (0 if first is None else first.token_evaluations),
        seconds=0.0,
        backend="sweeps",
    )
