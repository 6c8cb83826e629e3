"""Solve, measure what was solved, and solve again what fell short."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.flows.base import Block
from jacobiflow.solvers.guess import Given
from jacobiflow.solvers.partition import Sequential
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.solve import Solver, no_gradients, solve
from jacobiflow.solvers.stopping import Tolerance


def certify(
    block: Block, z: Float[Tensor, "b t c"], x: Float[Tensor, "b t c"], context: Tensor | None = None,
    slots: int | None = None,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Largest |g(x) - x| per sample, over tokens and channels, from one parallel pass; inf where it is not finite.

    `slots` samples are passed at a time, all by default.
    """
    found = []
    size = slots or max(len(z), 1)
    with no_gradients(block):
        for first in range(0, max(len(z), 1), size):
            rows = slice(first, first + size)
            cache = block.init_cache(z[rows], None if context is None else context[rows])
            g = block.update(x[rows], z[rows], 0, z.shape[1], cache)
            found.append((g - x[rows]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2)))
        residual = torch.cat(found)
    return residual.clone()


def solve_certified(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None, certificate: bool = True,
    slots: int | None = None, tolerance: float | None = None,
) -> Solution:  # fmt: skip
    """`solve`, then its certificate, then a second and third attempt for the samples that fell short.

    A sample whose certificate is above `tolerance`, by default the solver's own, is resumed from where it stands. One
    that is still above it, that missed the solver's own tolerance by `MaxSweeps`, or that is not finite, is solved
    token by token and counted. What remains above the tolerance then is the rounding of the network
    (`Status.ROUNDING`); what remains non-finite is so in the exact inverse too (`Status.NONFINITE`). Stopping on
    `MaxSweeps` without a tolerance is a legitimate end. With `certificate=False` the pass that measures is left out,
    and the swept residuals stand. At most `slots` samples are in the network at a time, all by default.
    """
    started = time.perf_counter()
    solution = solve(block, z, solver, context, slots)
    own = solver.stopping.atol
    atol = tolerance if certificate and tolerance is not None else own
    exact = isinstance(solver.partition, Sequential)

    if certificate:
        solution = _certified(block, z, solution, context, slots)
        if atol is not None:  # what ran out of sweeps but came within the tolerance by its last one is no miss
            within = (solution.status == Status.MAX_SWEEPS) & (solution.residual <= atol)
            solution = replace(solution, status=solution.status.masked_fill(within, Status.CONVERGED))
    if atol is not None and certificate and not exact:
        ended = (solution.status == Status.CONVERGED) | ((solution.status == Status.MAX_SWEEPS) & (own is None))
        short = (solution.residual > atol) & ended
        resumed = replace(solver, guess=Given(solution.x[short]), stopping=Tolerance(atol), coarse=0)
        solution = _again(block, z, solution, short, resumed, context, certificate, slots)
    wrong = solution.status == Status.NONFINITE
    if atol is not None:
        wrong |= (solution.residual > atol) | (solution.status == Status.MAX_SWEEPS)
    if not exact:
        solution = _again(block, z, solution, wrong, Solver(Sequential()), context, certificate, slots)
        solution = replace(solution, resolved_sequentially=wrong)
    status = solution.status
    if atol is not None:
        status = status.masked_fill((solution.residual > atol) & (status == Status.CONVERGED), Status.ROUNDING)
    return replace(solution, status=status, seconds=time.perf_counter() - started)


def _certified(block: Block, z: Tensor, solution: Solution, context: Tensor | None, slots: int | None) -> Solution:
    batch, length, _ = z.shape
    return replace(
        solution,
        residual=certify(block, z, solution.x, context, slots),
        network_calls=solution.network_calls + -(-batch // (slots or max(batch, 1))),
        token_evaluations=solution.token_evaluations + batch * length,
    )


def _again(
    block: Block, z: Tensor, solution: Solution, which: Bool[Tensor, " b"], solver: Solver, context: Tensor | None,
    certificate: bool, slots: int | None,
) -> Solution:  # fmt: skip
    """`solution` with the samples `which` replaced by what `solver` makes of them."""
    if not which.any():
        return solution
    rows = None if context is None else context[which]
    better = solve(block, z[which], solver, rows, slots)
    if certificate:
        better = _certified(block, z[which], better, rows, slots)
    return replace(
        solution,
        x=solution.x.index_put((which,), better.x),
        status=solution.status.index_put((which,), better.status),
        residual=solution.residual.index_put((which,), better.residual),
        sample_sweeps=solution.sample_sweeps.index_put((which,), better.sample_sweeps, accumulate=True),
        sweeps=solution.sweeps + better.sweeps,
        network_calls=solution.network_calls + better.network_calls,
        token_evaluations=solution.token_evaluations + better.token_evaluations,
    )
