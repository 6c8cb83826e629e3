"""Solve, measure what was solved, and solve again what fell short."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.checks import check_choice, check_count, check_kind, check_number
from jacobiflow.flows.base import Block, evaluate
from jacobiflow.solvers.guess import Given
from jacobiflow.solvers.partition import Sequential
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.solve import check_tokens, no_gradients, solve
from jacobiflow.solvers.solver import Solver
from jacobiflow.solvers.stopping import Tolerance

Certificate = bool | Literal["always"]

_CLOSER = 0.5  # a sample that is resumed stops at so much of the tolerance: at the tolerance it would often miss again
_NEAR = 2.0  # residuals up to so many tolerances are the loop's own, not rounding: fronts leave up to 1.5
_SPREAD = 4.0  # the rounding of one sample is taken to be within this factor of another's


def certify(
    block: Block, z: Float[Tensor, "b t c"], x: Float[Tensor, "b t c"], context: Tensor | None = None,
    slots: int | None = None,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Largest |g(x) - x| per sample, over tokens and channels, from one parallel pass; inf where it is not finite.

    `slots` samples are passed at a time, all by default. **Raises** `TypeError` or `ValueError` where `x` and `z` are
    no tokens of the block, or `context` has not a row for each of theirs.
    """
    check_tokens(block, z, context, x=x)
    if slots is not None:
        slots = check_count("slots", slots)
    residual = z.new_empty(len(z))
    size = slots or max(len(z), 1)
    with no_gradients(block):
        for first in range(0, len(z), size):
            rows = slice(first, first + size)
            g = evaluate(block, x[rows], z[rows], None if context is None else context[rows])
            residual[rows] = (g - x[rows]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2))
    return residual


def solve_certified(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None,
    certificate: Certificate = True, slots: int | None = None, tolerance: float | None = None, rounding: float = 0.0,
) -> Solution:  # fmt: skip
    """`solve`, then its certificate, then a second and third attempt for the samples that fell short.

    What was solved token by token is a solution by construction: no pass measures it, and its residual is 0, unless
    `certificate` is "always".

    A sample whose certificate is above `tolerance`, by default the solver's own, is resumed from where it stands, to
    half of it. One that is still above it, that ran out of sweeps before the solver's own tolerance, or that is not
    finite, is solved token by token and counted. The worst of them goes first: the residual that its exact solve leaves
    above the tolerance is the rounding of the network, and the others whose residuals are about that large end as
    `Status.ROUNDING` where they stand. What remains non-finite is so in the exact inverse too (`Status.NONFINITE`).
    Stopping on `MaxSweeps` or `EarlyStop` without a tolerance is a legitimate end.

    With `certificate=False` the pass that measures is left out, and the swept residuals stand. At most `slots` samples
    are in the network at a time, all by default. `rounding` is the residual that rounding left in an earlier block, if
    any: `Solution.rounding` passes it on, so that it is found once.

    **Raises** as `solve` does, and for a `certificate`, `tolerance` or `rounding` that is none.
    """
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    check_certificate("certificate", certificate)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance)
    rounding = check_number("rounding", rounding)
    if slots is not None:
        slots = check_count("slots", slots)
    started = time.perf_counter()
    own = solver.stopping.atol
    atol = tolerance if certificate and tolerance is not None else own
    attempts = _Attempts(block, z, context, slots, certificate)
    solution = attempts.first(solver)
    if certificate and atol is not None:
        # What ran out of sweeps but came within the tolerance by its last one is no miss.
        within = (solution.status == Status.MAX_SWEEPS) & (solution.residual <= atol)
        solution = replace(solution, status=solution.status.masked_fill(within, Status.CONVERGED))
        ended = (solution.status == Status.CONVERGED) | ((solution.status == Status.MAX_SWEEPS) & (own is None))
        short = (solution.residual > atol) & ended & ~solution.exact & ~_is_rounding(solution.residual, atol, rounding)
        resumed = replace(solver, guess=Given(solution.x[short]), stopping=Tolerance(_CLOSER * atol), coarse=0)
        solution = attempts.again(solution, short, resumed)
    solution = _solve_sequentially(attempts, solution, atol, rounding)
    status = solution.status
    if atol is not None:
        status = status.masked_fill((solution.residual > atol) & (status != Status.NONFINITE), Status.ROUNDING)
    return replace(solution, status=status, seconds=time.perf_counter() - started)


def check_certificate(name: str, certificate: Certificate) -> None:
    """**Raises** `ValueError` where it is none."""
    check_choice(name, certificate, (True, False, "always"))


def _solve_sequentially(attempts: _Attempts, solution: Solution, atol: float | None, rounding: float) -> Solution:
    """Token by token, the samples that sweeps have not solved, except those whose residual is rounding."""
    lost = (solution.status == Status.NONFINITE) & ~solution.exact
    short = torch.zeros_like(lost)
    if atol is not None:
        short = (solution.status == Status.MAX_SWEEPS) | (solution.residual > atol)
        short &= ~lost & ~solution.exact & ~_is_rounding(solution.residual, atol, rounding)
        if attempts.certificate and int(short.sum()) > 1:
            worst = torch.zeros_like(short)
            worst[solution.residual.masked_fill(~short, -1.0).argmax()] = True
            solution = attempts.again(solution, worst, Solver(Sequential()))
            solution = replace(solution, resolved_sequentially=solution.resolved_sequentially | worst)
            left = float(solution.residual[worst].max())
            if atol < left < torch.inf:
                rounding = max(rounding, left)
            short &= ~worst & ~_is_rounding(solution.residual, atol, rounding)
    again = lost | short
    solution = attempts.again(solution, again, Solver(Sequential()))
    resolved = solution.resolved_sequentially | again
    if atol is not None and attempts.certificate:
        above = (resolved | solution.exact) & (solution.residual > atol) & solution.residual.isfinite()
        rounding = max([rounding, *solution.residual[above].tolist()])
    return replace(solution, resolved_sequentially=resolved, rounding=rounding)


def _is_rounding(residual: Float[Tensor, " b"], atol: float, rounding: float) -> Bool[Tensor, " b"]:
    return (residual > _NEAR * atol) & (residual <= _SPREAD * rounding)


@dataclass(frozen=True)
class _Attempts:
    """Solves of one block at `z`, each certified where certificates are asked for."""

    block: Block
    z: Tensor
    context: Tensor | None
    slots: int | None
    certificate: Certificate

    def first(self, solver: Solver) -> Solution:
        """All samples."""
        solution = solve(self.block, self.z, solver, self.context, self.slots)
        if self.certificate != "always" and bool(solution.exact.all()):
            return solution
        return self._certified(self.z, solution, self.context)

    def again(self, solution: Solution, which: Bool[Tensor, " b"], solver: Solver) -> Solution:
        """`solution` with the samples `which` replaced by what `solver` makes of them."""
        if not which.any():
            return solution
        z, context = self.z[which], None if self.context is None else self.context[which]
        better = self._certified(z, solve(self.block, z, solver, context, self.slots), context)
        replaced = {
            name: getattr(solution, name).index_put((which,), getattr(better, name))
            for name in ("x", "status", "residual", "exact")
        }
        return replace(
            solution,
            **replaced,
            sample_sweeps=solution.sample_sweeps.index_put((which,), better.sample_sweeps, accumulate=True),
            sweeps=solution.sweeps + better.sweeps,
            network_calls=solution.network_calls + better.network_calls,
            token_evaluations=solution.token_evaluations + better.token_evaluations,
        )

    def _certified(self, z: Tensor, solution: Solution, context: Tensor | None) -> Solution:
        if not self.certificate:
            return solution
        batch, length, _ = z.shape
        return replace(
            solution,
            residual=certify(self.block, z, solution.x, context, self.slots),
            network_calls=solution.network_calls + -(-batch // (self.slots or max(batch, 1))),
            token_evaluations=solution.token_evaluations + batch * length,
        )
