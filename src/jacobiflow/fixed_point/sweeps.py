"""`solve`: the fixed point of a block by sweeps, and its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.blocks.base import Block, no_gradients, supports
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.fixed_point.cuda_graphs import TokenLoop
from jacobiflow.fixed_point.engine import Deadline, Loop
from jacobiflow.fixed_point.fronts import Fronts
from jacobiflow.fixed_point.guess import WarmStart
from jacobiflow.fixed_point.partition import Whole
from jacobiflow.fixed_point.solver import MaxSweeps, Solver
from jacobiflow.utils.checks import check_count, check_finite, check_kind, check_on, check_rows, format_value


class Status(IntEnum):
    """The end of a sample's solve.

    Example:
        >>> jf.Status.MAX_SWEEPS.message
        'stopped by MaxSweeps; raise it, or use a Tolerance, for a smaller residual'
    """

    CONVERGED = 0
    MAX_SWEEPS = 1
    ROUNDING = 2
    NONFINITE = 3

    @property
    def message(self) -> str:
        """Its meaning and the remedy."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "every token changed by at most the tolerance in its last sweep, was stopped early, or is exact",
    Status.MAX_SWEEPS: "stopped by MaxSweeps; raise it, or use a Tolerance, for a smaller residual",
    Status.ROUNDING: "its residual is above the tolerance, as is that of an exact solve: this is the rounding of the "
    "network's dtype; raise the tolerance or use a wider dtype",
    Status.NONFINITE: "a value overflowed; solve_certified finds out whether it does in the exact inverse too, which "
    "lower guidance or a wider dtype may cure",
}


@dataclass(frozen=True)
class Solution:
    """The solved tokens of one block, in its causal order, and their cost.

    Attributes:
        x: The tokens.
        status: A `Status` per sample.
        residual: The largest |g(x) - x| if certified, else the largest change that a token's last sweep made (0 for a
            token that is exact by Proposition 1).
        log_det: The sum of log_scale(x) over tokens and channels, at this x: log|det dx/dz| in nats. The pass of a
            certificate gives it, and so does an exact loop in native code; else it is NaN.
        exact: True for samples all of whose tokens were computed from final ones, one at a time.
        used_fallback: True for samples that were solved again token by token.
        sample_sweeps: Sweeps that each sample was part of until it was final.
        network_calls: Evaluations of the block, certificates included.
        token_evaluations: Tokens times samples over these calls.

    Example:
        >>> flow, z = jf.load("digits-p1"), torch.ones(2, 64, 1)
        >>> solution = jf.solve(flow.blocks[0], z, jf.Solver(jf.Sequential()))
        >>> solution.exact, solution.sweeps
        (tensor([True, True]), 64)
    """

    x: Float[Tensor, "b t c"]
    status: Int[Tensor, " b"]
    residual: Float[Tensor, " b"]
    log_det: Float[Tensor, " b"]
    exact: Bool[Tensor, " b"]
    used_fallback: Bool[Tensor, " b"]
    sample_sweeps: Int[Tensor, " b"]
    sweeps: int
    network_calls: int
    token_evaluations: int
    seconds: float


def solve(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None, slots: int | None = None,
    time_limit: float | None = None,
) -> Solution:  # fmt: skip
    """Solves x = g(x) for the inverse of a block, by sweeps x <- g(x) over runs of tokens.

    A sweep evaluates g on the run [front, stop) that the partition chooses. Then the front passes the leading tokens
    that the sweep changed by at most the tolerance, and one more, which was computed from final ones (Proposition 1 of
    the paper): T sweeps always suffice. A token that has had `max_sweeps` sweeps is passed as it is.

    If a partition whose run slides (`Whole`, `Window`) stops on a tolerance and the block has `per_sample_front`, each
    sample has a front of its own. Else the batch shares one front, which waits for the slowest sample. If every run is
    one token, the block's `exact_inverse` is called instead.

    A value that overflows is set back to the guess. A sample that had one when the front passed it ends as
    `Status.NONFINITE`. A sample whose residual keeps growing under a correction is swept plainly from there on.

    Args:
        block: Gives g.
        z: Input of the block in its causal order, float32 or float64.
        solver: The partition, guess, correction and stopping.
        context: One row for each sample (labels, for example).
        slots: Samples that are swept at a time, all by default. The next ones enter as others finish.
        time_limit: Seconds after which TimeoutError is raised, between two sweeps.

    Example:
        >>> block, z = jf.load("digits-p1").blocks[0], torch.ones(2, 64, 1)
        >>> solution = jf.solve(block, z, jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-3)))
        >>> bool((solution.residual <= 1e-3).all()), solution.sweeps < 64
        (True, True)
    """
    check_tokens(block, z, context)
    check_finite("z", z)
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    return solve_until(Deadline(time_limit), block, z, replace(solver, int16_weights=False), context, slots)


def solve_until(
    deadline: Deadline, block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int | None
) -> Solution:
    """Solves as `solve` does, until a deadline and without checks of the tokens.

    The residuals of rounded weights' answers are infinite until they are certified.
    """
    started = time.perf_counter()
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    batches = split(len(z), slots, context)
    solver.check(*z.shape[1:])
    if solver.bf16_sweeps and not supports(block, "has_bf16"):
        name = type(block).__name__
        raise InputValueError(f"bf16_sweeps={solver.bf16_sweeps}: {name} has no bfloat16 network; give 0")
    length, x, log_det, is_rounded = z.shape[1], None, z.new_full((len(z),), torch.nan), False
    with no_gradients(block):
        if batches and solver.partition.token_by_token(length):
            if solver.int16_weights:
                answer = _recur(getattr(block, "rounded_inverse", None), z, batches, deadline)
                is_rounded = answer is not None
            if not is_rounded:
                answer = _recur(getattr(block, "exact_inverse", None), z, batches, deadline)
            if answer is None and z.is_cuda and supports(block, "graph_safe"):
                answer = _recur(TokenLoop(block), z, batches, deadline)
            if answer is not None:
                x, log_det = answer
        if x is None:
            loop = _sweep(block, z, solver, context, slots or len(z), deadline)
            x, fronts, sweeps, token_evaluations = loop.x, loop.fronts, loop.sweeps, loop.token_evaluations
        else:  # it counts as T sweeps
            fronts = Fronts.enter(len(z), z)
            fronts.sweeps += length
            if is_rounded:
                fronts.exact.fill_(False)
                fronts.residual.fill_(torch.inf)
            sweeps, token_evaluations = length * len(batches), length * len(z)
    failed = ~x.isfinite().all(dim=(1, 2))
    failed |= fronts.failed
    status = torch.where(fronts.missed, Status.MAX_SWEEPS, Status.CONVERGED).masked_fill(failed, Status.NONFINITE)
    return Solution(
        x=x.clone(),  # outside inference mode, so that autograd takes the tensors
        status=status,
        residual=fronts.residual.masked_fill(failed, torch.inf),
        log_det=log_det.clone(),
        exact=fronts.exact.clone(),
        used_fallback=torch.zeros_like(failed),
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
            raise InputTypeError(f"{name}={format_value(tokens)}: give {give}")
        if tokens.ndim != 3 or tokens.shape != z.shape or not tokens.shape[1:].numel():
            raise InputValueError(
                f"{name}={format_value(tokens)}: give {give}{'' if tokens is z else ', as many as z'}"
            )
        check_on(name, tokens, z.device)
    if context is not None:
        check_rows("context", context, len(z), "rows of z")
        check_on("context", context, z.device)


def split(num: int, slots: int | None, context: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Returns the rows of batches of at most `slots` samples, all of them by default, each with its context."""
    size = max(num, 1) if slots is None else check_count("slots", slots)
    rows = [slice(first, first + size) for first in range(0, num, size)]
    return [(each, None if context is None else context[each]) for each in rows]


def _recur(
    recurrence: Callable[[Tensor, Any], tuple[Tensor, Tensor] | None] | None, z: Tensor,
    batches: list[tuple[slice, Tensor | None]], deadline: Deadline,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The answers of a recurrence with their sums of log-scales, batch by batch, if it has them."""
    if recurrence is None:
        return None
    parts = []
    for rows, context in batches:
        part = recurrence(z[rows], context)
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
    loop = _sweep(block, z, replace(solver, guess=WarmStart(in_bf16.x), bf16_sweeps=0), context, slots, deadline)
    loop.sweeps += in_bf16.sweeps
    loop.token_evaluations += in_bf16.token_evaluations
    loop.fronts.sweeps += in_bf16.fronts.sweeps
    return loop
