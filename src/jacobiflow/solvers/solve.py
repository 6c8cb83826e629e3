"""`solve`: the fixed point of a block by sweeps."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import check_count, check_finite, check_kind, check_on, check_rows, short
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.flows.base import Block, no_gradients, supports
from jacobiflow.solvers.fronts import Fronts
from jacobiflow.solvers.graphs import solve_by_tokens
from jacobiflow.solvers.guess import Given
from jacobiflow.solvers.loop import Deadline, Loop
from jacobiflow.solvers.partition import Whole
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.solver import MaxSweeps, Solver


def solve(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None, slots: int | None = None,
    time_limit: float | None = None,
) -> Solution:  # fmt: skip
    """Solves x = g(x) for the inverse of a block, by sweeps x <- g(x) over runs of tokens.

    A sweep evaluates g on the run [front, stop) that the partition chooses, and sets the run to it, or to a corrected
    iterate. Then the front passes the leading tokens that the sweep changed by at most the tolerance, and one more. All
    tokens that this one was computed from are final to within the tolerance, so it is too (Proposition 1 of the paper).
    T sweeps always suffice. A token that has had `max_sweeps` sweeps is passed as it is.

    If a partition whose run slides (`Whole`, `Window`) stops on a tolerance and the block has `per_sample_front`, each
    sample has a front of its own, and samples that have finished leave the batch. Else the batch shares one front,
    which waits for the slowest. If every run is one token, the block's `exact_inverse` is called instead.

    A value that overflows is set back to the guess. A sample that had one when the front passed it ends as
    `Status.NONFINITE`; `solve_certified` solves it again. A sample whose residual keeps growing under a correction is
    swept plainly from there on.

    Args:
        block: Gives g.
        z: Input of the block in its causal order, shape (B, T, C), float32 or float64.
        solver: The partition, guess, correction and stopping.
        context: One row for each sample (labels, for example).
        slots: Samples that are swept at a time, all by default. The next ones enter as others finish (continuous
            batching).
        time_limit: Seconds after which TimeoutError is raised, between two sweeps.

    Example:
        >>> block, z = jf.load("digits-p1").blocks[0], torch.ones(2, 64, 1)
        >>> solution = jf.solve(block, z, jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-3)))
        >>> bool((solution.residual <= 1e-3).all()), solution.sweeps < 64
        (True, True)
    """
    return solve_until(Deadline(time_limit), block, z, solver, context, slots)


def solve_until(
    deadline: Deadline, block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int | None
) -> Solution:
    """Solves as `solve` does, until a deadline."""
    started = time.perf_counter()
    check_tokens(block, z, context)
    check_finite("z", z)
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    slots = max(len(z), 1) if slots is None else check_count("slots", slots)
    solver.check(*z.shape[1:])
    if solver.bf16_sweeps and not supports(block, "has_bf16"):
        raise InputValueError(
            f"bf16_sweeps={solver.bf16_sweeps}: {type(block).__name__} has no bfloat16 network; give 0"
        )
    length, x, log_det = z.shape[1], None, z.new_full((len(z),), torch.nan)
    with no_gradients(block):
        if len(z) and solver.partition.token_by_token(length):
            if (answer := _exact_inverse(block, z, context, slots, deadline)) is not None:
                x, log_det = answer
            elif z.device.type == "cuda" and supports(block, "graph_safe"):
                x = solve_by_tokens(block, z, context, slots)
        if x is None:
            loop = _sweep(block, z, solver, context, slots, deadline)
            x, fronts, sweeps, token_evaluations = loop.x, loop.fronts, loop.sweeps, loop.token_evaluations
        else:  # it counts as T sweeps
            fronts = Fronts.enter(len(z), z)
            fronts.sweeps += length
            sweeps, token_evaluations = length * -(-len(z) // slots), length * len(z)
    failed = fronts.failed | ~torch.isfinite(x).all(dim=(1, 2))
    status = torch.where(fronts.missed, Status.MAX_SWEEPS, Status.CONVERGED).masked_fill(failed, Status.NONFINITE)
    return Solution(
        x=x.clone(),  # outside inference mode, so that autograd takes the tensors
        status=status,
        residual=fronts.residual.masked_fill(failed, torch.inf),
        log_det=log_det.clone(),
        exact=fronts.exact.clone(),
        resolved_sequentially=torch.zeros(len(z), dtype=torch.bool, device=z.device),
        sample_sweeps=fronts.sweeps.clone(),
        sweeps=sweeps,
        network_calls=sweeps,
        token_evaluations=token_evaluations,
        seconds=time.perf_counter() - started,
    )


def check_tokens(block: Block, z: Tensor, context: Tensor | None, **others: Tensor) -> None:
    """Raises TypeError or ValueError if `z`, `others` and `context` are not tokens and a context that fit together."""
    check_kind("block", block, Block, "a block, such as flow.blocks[0]")
    for name, tokens in {"z": z, **others}.items():
        give = "float32 or float64 tokens (B, T, C), whatever the network runs in"
        check_kind(name, tokens, Tensor, give)
        if tokens.dtype not in (torch.float32, torch.float64):
            raise InputTypeError(f"{name}={short(tokens)}: give {give}")
        if tokens.ndim != 3 or tokens.shape != z.shape or not tokens.shape[1:].numel():
            raise InputValueError(f"{name}={short(tokens)}: give {give}{'' if tokens is z else ', as many as z'}")
        check_on(name, tokens, z.device)
    if context is not None:
        check_rows("context", context, len(z), "rows of z")
        check_on("context", context, z.device)


def _exact_inverse(
    block: Block, z: Tensor, context: Tensor | None, slots: int, deadline: Deadline
) -> tuple[Tensor, Tensor] | None:
    """The recurrence of the block itself, if it has one."""
    exact_inverse = getattr(block, "exact_inverse", None)
    parts: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(z), slots):
        rows = slice(first, first + slots)
        part = exact_inverse and exact_inverse(z[rows], None if context is None else context[rows])
        if part is None:
            return None
        deadline.check()
        parts.append(part)
    x, log_det = map(torch.cat, zip(*parts, strict=True))
    return x, log_det


def _sweep(block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int, deadline: Deadline) -> Loop:
    """The sweeps of a solver, after those in bfloat16 if it has any."""
    if not solver.bf16_sweeps:
        loop = Loop(block, z, solver, context, slots, deadline)
        loop.run()
        return loop
    first = replace(solver, partition=Whole(), stopping=MaxSweeps(solver.bf16_sweeps))
    in_bf16 = Loop(block, z, first, context, slots, deadline, in_bf16=True)
    in_bf16.run()
    loop = _sweep(block, z, replace(solver, guess=Given(in_bf16.x), bf16_sweeps=0), context, slots, deadline)
    loop.sweeps += in_bf16.sweeps
    loop.token_evaluations += in_bf16.token_evaluations
    loop.fronts.sweeps += in_bf16.fronts.sweeps
    return loop
