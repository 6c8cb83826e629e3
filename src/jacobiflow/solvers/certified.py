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

_CLOSER = 0.5  # a sample is resumed to this share of the tolerance: at the tolerance itself it would often miss again
_NEAR = 2.0  # residuals up to this many tolerances come from the sweeps, not from rounding: fronts leave up to 1.5
_PROBES = 4  # samples whose exact solves show the rounding of a block
_SPREAD = 4.0  # the relative rounding of one sample is taken to be within this factor of another's


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
    certificate: Certificate = True, slots: int | None = None, tolerance: float | None = None,
) -> Solution:  # fmt: skip
    """Solves a block, certifies each sample, and solves again each sample that is above the tolerance.

    An exact loop is a solution by construction. Its residual counts as 0 and is not measured, unless `certificate` is
    "always".

    A sample above the tolerance is resumed from its answer, to half of the tolerance. If it is still above, if it ran
    out of sweeps before the solver's own tolerance, or if it is not finite, it is solved token by token and counted. A
    value that then overflows does so in the exact inverse too (`Status.NONFINITE`).

    An exact solve leaves a residual as well: the rounding of the network, which grows with the size of x. If more than
    four samples are to be solved token by token, the four with the largest residuals go first. Of what these leave, the
    smallest |g(x) - x| / |x| is the relative rounding of the block. Other samples whose residuals are at most four
    times as large, relative to their own x, keep their answers and end as `Status.ROUNDING`. Nothing is carried from
    one block to another.

    A solver that stops on `MaxSweeps` or `EarlyStop` alone is held to no tolerance, unless `tolerance` is given: its
    samples are measured and end as they are.

    Args:
        block: Gives g.
        z: Input of the block in its causal order, shape (B, T, C), float32 or float64.
        solver: How to solve it first.
        context: One row for each sample (labels, for example), or `None`.
        certificate: `False` leaves out the pass that measures; then the residuals are those of the sweeps. "always"
            measures exact loops too.
        slots: Samples in the network at a time; all by default.
        tolerance: What residuals are held to; the solver's own tolerance by default.

    Returns:
        A `Solution` whose residuals are measured.

    Raises:
        ValueError: As `solve`, and if `certificate` is not True, False or "always".
    """
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    check_certificate("certificate", certificate)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance)
    if slots is not None:
        slots = check_count("slots", slots)
    started = time.perf_counter()
    own = solver.stopping.atol
    atol = tolerance if certificate and tolerance is not None else own
    attempts = _Attempts(block, z, context, slots, certificate)
    solution = attempts.first(solver)
    if certificate and atol is not None:
        # A sample that ran out of sweeps, but came within the tolerance by its last one, has converged.
        within = (solution.status == Status.MAX_SWEEPS) & (solution.residual <= atol)
        solution = replace(solution, status=solution.status.masked_fill(within, Status.CONVERGED))
        ended = (solution.status == Status.CONVERGED) | ((solution.status == Status.MAX_SWEEPS) & (own is None))
        short = _is_short(solution, atol) & ended
        resumed = replace(solver, guess=Given(solution.x[short]), stopping=Tolerance(_CLOSER * atol), coarse=0)
        solution = attempts.again(solution, short, resumed)
    short = (solution.status == Status.NONFINITE) & ~solution.exact
    if atol is not None:
        rounding = 0.0
        if certificate:
            solution, rounding = _probe_rounding(attempts, solution, atol)
        short |= _is_short(solution, atol, rounding)
    solution = attempts.sequentially(solution, short)
    status = solution.status
    if atol is not None:
        status = status.masked_fill((solution.residual > atol) & (status != Status.NONFINITE), Status.ROUNDING)
    return replace(solution, status=status, seconds=time.perf_counter() - started)


def check_certificate(name: str, certificate: Certificate) -> None:
    """Raises ValueError if `certificate` is not True, False or "always"."""
    check_choice(name, certificate, (True, False, "always"))


def _probe_rounding(attempts: _Attempts, solution: Solution, atol: float) -> tuple[Solution, float]:
    """The solution with some samples solved token by token, and the relative rounding of the block; 0 if not found."""
    short = _is_short(solution, atol)
    if int(short.sum()) <= _PROBES:
        return solution, 0.0
    probes = torch.zeros_like(short)
    probes[solution.residual.masked_fill(~short, -1.0).topk(_PROBES).indices] = True
    solution = attempts.sequentially(solution, probes)
    relative = solution.residual[probes] / _size(solution.x[probes])
    return solution, float(relative.nan_to_num(nan=0.0, posinf=0.0).min())


def _is_short(solution: Solution, atol: float, rounding: float = 0.0) -> Bool[Tensor, " b"]:
    """The samples to solve again: finite, not exact, and above the tolerance by more than the relative rounding."""
    above = (solution.status == Status.MAX_SWEEPS) | (solution.residual > atol)
    is_rounding = (solution.residual > _NEAR * atol) & (solution.residual <= _SPREAD * rounding * _size(solution.x))
    return above & ~solution.exact & (solution.status != Status.NONFINITE) & ~is_rounding


def _size(x: Float[Tensor, "b t c"]) -> Float[Tensor, " b"]:
    return x.abs().amax(dim=(1, 2))


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

    def sequentially(self, solution: Solution, which: Bool[Tensor, " b"]) -> Solution:
        """`solution` with the samples `which` solved token by token, and counted."""
        solution = self.again(solution, which, Solver(Sequential()))
        return replace(solution, resolved_sequentially=solution.resolved_sequentially | which)

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
