"""Solve, measure what was solved, and solve again what fell short."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.blocks.base import Block, evaluate, no_gradients
from jacobiflow.fixed_point.engine import Deadline
from jacobiflow.fixed_point.guess import WarmStart
from jacobiflow.fixed_point.partition import Sequential, Whole
from jacobiflow.fixed_point.solver import Solver, Tolerance
from jacobiflow.fixed_point.sweeps import Solution, Status, check_tokens, solve_until, split
from jacobiflow.utils.checks import check_choice, check_finite, check_number

CertifyMode = bool | Literal["always"]

_CLOSER = 0.5  # a sample is resumed to this share of the tolerance: at the tolerance itself it would often miss again
_NEAR = 2.0  # residuals up to this many tolerances come from the sweeps, not from rounding: fronts leave up to 1.5
_PROBES = 4  # samples whose exact solves show the rounding of a block
_SPREAD = 4.0  # the relative rounding of one sample is taken to be within this factor of another's


def certify(
    block: Block, z: Float[Tensor, "b t c"], x: Float[Tensor, "b t c"], context: Tensor | None = None,
    slots: int | None = None,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Returns the largest |g(x) - x| of each sample, over tokens and channels, from one parallel pass.

    It is infinite for a sample that is not finite.

    Example:
        >>> flow, z = jf.load("digits-p1"), torch.ones(2, 64, 1)
        >>> x = jf.solve(flow.blocks[0], z, jf.Solver(jf.Sequential())).x
        >>> bool((jf.certify(flow.blocks[0], z, x) < 1e-4).all())
        True
    """
    check_tokens(block, z, context, x=x)
    return measure(block, z, x, context, slots)[0]


def measure(
    block: Block, z: Tensor, x: Tensor, context: Tensor | None, slots: int | None
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Returns the residuals of `certify`, and the sums of log_scale(x), NaN for a block that is not affine."""
    residual, log_det = z.new_empty(len(z)), z.new_empty(len(z))
    with no_gradients(block):
        for rows, some in split(len(z), slots, context):
            g, log_det[rows] = evaluate(block, x[rows], z[rows], some)
            residual[rows] = (g - x[rows]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=(1, 2))
    return residual, log_det


def solve_certified(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None,
    certificate: CertifyMode = True, slots: int | None = None, tolerance: float | None = None,
    time_limit: float | None = None,
) -> Solution:  # fmt: skip
    """Solves a block, certifies each sample, and solves again each sample that is above the tolerance.

    Such a sample is resumed from its answer, to half of the tolerance. If it is still above, if it ran out of sweeps
    before the solver's own tolerance, or if it is not finite, it is solved token by token.

    An exact solve leaves a residual as well: the rounding of the network. If more than four samples are to be solved
    token by token, the four with the largest residuals go first. The smallest |g(x) - x| / |x| that they leave is the
    relative rounding of the block. Other samples up to four times it keep their answers, as `Status.ROUNDING`.

    The arguments that are not listed are those of `solve`.

    Args:
        certificate: `False` leaves out the pass that measures; "always" measures exact loops too, whose residual is
            else 0 by construction.
        tolerance: The largest residual allowed, by default the solver's own. Without either, samples end as they are.

    Example:
        >>> flow, z = jf.load("digits-p1"), torch.ones(2, 64, 1)
        >>> solution = jf.solve_certified(flow.blocks[0], z, jf.Solver(jf.Window(16), stopping=jf.Tolerance(1e-3)))
        >>> bool((solution.residual <= 1e-3).all())
        True
    """
    check_certify_mode("certificate", certificate)
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance)
    check_tokens(block, z, context)
    check_finite("z", z)
    return solve_certified_unchecked(block, z, solver, context, certificate, slots, tolerance, time_limit)


def solve_certified_unchecked(
    block: Block, z: Tensor, solver: Solver, context: Tensor | None, certificate: CertifyMode, slots: int | None,
    tolerance: float | None, time_limit: float | None = None,
) -> Solution:  # fmt: skip
    """Solves as `solve_certified` does. It leaves out the checks of the arguments, one of which waits for a GPU."""
    started = time.perf_counter()
    attempts = _Attempts(block, z, context, slots, certificate, Deadline(time_limit))
    atol, rounding = tolerance if certificate and tolerance is not None else solver.stopping.atol, 0.0
    if not certificate or not atol:
        solver = replace(solver, int16_weights=False)
    attempts.first(solver)
    if not attempts.is_exact:
        if certificate and atol is not None:
            attempts.resume(solver, atol)
            rounding = attempts.probe_rounding(atol)
        short = (attempts.solution.status == Status.NONFINITE) & ~attempts.solution.exact
        if atol is not None:
            short |= attempts.short(atol, rounding)
        attempts.sequentially(short)
    solution = attempts.solution
    if atol is not None:  # NONFINITE is larger
        is_above = solution.residual > atol
        status = torch.where(is_above, solution.status.clamp(min=Status.ROUNDING), solution.status)
        solution = replace(solution, status=status)
    return replace(solution, seconds=time.perf_counter() - started)


def check_certify_mode(name: str, certificate: CertifyMode) -> None:
    """Raises ValueError if `certificate` is not True, False or "always"."""
    check_choice(name, certificate, (True, False, "always"))


@dataclass
class _Attempts:
    """Solves of one block at `z`, each certified where certificates are asked for, and the solution so far."""

    block: Block
    z: Tensor
    context: Tensor | None
    slots: int | None
    certificate: CertifyMode
    deadline: Deadline
    solution: Solution = field(init=False)
    is_exact: bool = False  # if all samples were solved token by token at first

    def first(self, solver: Solver) -> None:
        self.solution = solve_until(self.deadline, self.block, self.z, solver, self.context, self.slots)
        self.is_exact = solver.is_exact(self.z.shape[1])  # reading `exact` waits for a GPU
        if solver.int16_weights:  # which are for CPUs; the block may have nothing to round
            self.is_exact = bool(self.solution.exact.all())
        if self.certificate == "always" or not self.is_exact:
            self.solution = self._certified(self.z, self.solution, self.context)

    def resume(self, solver: Solver, atol: float) -> None:
        """Solves samples that ended above the tolerance again, from their answers."""
        status = self.solution.status
        # A sample that ran out of sweeps, but came within the tolerance by its last one or had no other, has converged.
        has_ended = (self.solution.residual <= atol) | (solver.stopping.atol is None)
        status = status.masked_fill((status == Status.MAX_SWEEPS) & has_ended, Status.CONVERGED)
        self.solution = replace(self.solution, status=status)
        short = self.short(atol) & (status == Status.CONVERGED)
        guess, stopping = WarmStart(self.solution.x[short]), Tolerance(_CLOSER * atol)
        partition = Whole() if solver.int16_weights else solver.partition
        self._again(short, Solver(partition, guess, stopping, solver.correction))

    def probe_rounding(self, atol: float) -> float:
        """Solves some of many samples token by token; returns the relative rounding of the block, 0 if unknown."""
        short = self.short(atol)
        if int(short.sum()) <= _PROBES:
            return 0.0
        probes = torch.zeros_like(short)
        probes[self.solution.residual.masked_fill(~short, -torch.inf).topk(_PROBES).indices] = True
        self.sequentially(probes)
        # NaN, to which no residual compares as rounding, if one of them overflowed.
        return float((self.solution.residual[probes] / _size(self.solution.x[probes])).min())

    def short(self, atol: float, rounding: float = 0.0) -> Bool[Tensor, " b"]:
        """The samples to solve again: finite, not exact, and above the tolerance by more than the relative rounding."""
        status, residual = self.solution.status, self.solution.residual
        above = (status == Status.MAX_SWEEPS) | (residual > atol)
        is_rounding = (residual > _NEAR * atol) & (residual <= _SPREAD * rounding * _size(self.solution.x))
        return above & ~self.solution.exact & (status != Status.NONFINITE) & ~is_rounding

    def sequentially(self, which: Bool[Tensor, " b"]) -> None:
        """Solves the samples `which` token by token, and counts them."""
        self._again(which, Solver(Sequential()))
        resolved = self.solution.used_fallback | which
        self.solution = replace(self.solution, used_fallback=resolved)

    def _again(self, which: Bool[Tensor, " b"], solver: Solver) -> None:
        """Solves the samples `which` by `solver`."""
        if not which.any():
            return
        z, context = self.z[which], None if self.context is None else self.context[which]
        better = solve_until(self.deadline, self.block, z, solver, context, self.slots)
        better, solution = self._certified(z, better, context), self.solution
        replaced = {
            name: getattr(solution, name).index_put((which,), getattr(better, name))
            for name in ("x", "status", "residual", "log_det", "exact")
        }
        self.solution = replace(
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
        residual, log_det = measure(self.block, z, solution.x, context, self.slots)
        return replace(
            solution,
            residual=residual,
            log_det=log_det,
            network_calls=solution.network_calls + len(split(len(z), self.slots, context)),
            token_evaluations=solution.token_evaluations + z.shape[:2].numel(),
        )


def _size(x: Float[Tensor, "b t c"]) -> Float[Tensor, " b"]:
    return x.abs().amax(dim=(1, 2))
