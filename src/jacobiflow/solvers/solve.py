"""The one solver loop."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.flows.base import Block
from jacobiflow.solvers.correction import Correction, Plain
from jacobiflow.solvers.guess import Guess, Latent
from jacobiflow.solvers.partition import Partition, Segments, Whole
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.stopping import Stopping, Tolerance


@dataclass(frozen=True)
class Solver:
    """How to solve a block: four independent pieces.

    `Solver(Sequential())` is the exact loop, `Solver(Whole())` Jacobi, `Solver(Segments(G), stopping=MaxSweeps(J))`
    the paper's GS-Jacobi, `Solver(Window(n))` a sliding window.
    """

    partition: Partition = field(default_factory=Whole)
    guess: Guess = field(default_factory=Latent)
    stopping: Stopping = field(default_factory=lambda: Tolerance(1e-3))
    correction: Correction = field(default_factory=Plain)

    def __post_init__(self) -> None:
        counts = self.stopping.max_sweeps
        if isinstance(counts, tuple) and not (
            isinstance(self.partition, Segments) and self.partition.count == len(counts)
        ):
            raise ValueError(f"{len(counts)} sweep counts for {self.partition}: give one for each of its Segments")


def solve(block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None) -> Solution:
    """Solve x = g(x) for the inverse of `block` at `z`, by sweeps x <- g(x) over runs of tokens.

    A sweep evaluates g on the run [front, stop) that the partition chooses, and sets the run to it. Then the front goes
    past the leading tokens that the sweep changed by at most the tolerance, and past one more: all tokens that it was
    computed from are final, to within the tolerance, so it is too (Proposition 1). T sweeps always suffice. A token
    that has had `max_sweeps` sweeps is passed as it is; keys in the cache that this leaves a sweep behind are computed
    again by the next sweep. Keys of tokens passed by tolerance are those of the value before the last sweep.

    A value that overflows is set back to the guess. A sample that had one when the front passed it ends as
    `Status.NONFINITE`; nothing here hides that, and `solve_certified` acts on it.

    **Arguments:** `block` gives g, `z` (B, T, C) is its input in its own causal order, `context` has a row per sample
    (labels, say) or is `None`.

    **Returns:** a `Solution`, uncertified.

    **Raises:** `ValueError` where `z` is not finite or not (B, T, C), or the partition does not fit T.
    """
    if z.ndim != 3 or not torch.isfinite(z).all():
        raise ValueError(f"z of shape {tuple(z.shape)}: give finite values (batch, tokens, channels)")
    solver.partition.check(z.shape[1])
    started = time.perf_counter()
    with no_gradients(block):
        x, status, residual, sweeps, token_evaluations = _sweep(block, z, solver, context)
        status.tolist()  # waits for the device, so that the time is the work's
    return Solution(
        x=x.clone(),  # outside inference mode, so that autograd takes it
        status=status.clone(),
        residual=residual.clone(),
        resolved_sequentially=torch.zeros(len(z), dtype=torch.bool, device=z.device),
        sweeps=sweeps,
        network_calls=sweeps,
        token_evaluations=token_evaluations,
        seconds=time.perf_counter() - started,
    )


def no_gradients(block: Block) -> AbstractContextManager[None]:
    """Inference mode, a tenth faster where a step is small, for a block that says it keeps no tensor; else no_grad.

    A tensor that a block keeps from inference mode (a mask made on first use, say) could not be trained with later.
    """
    return torch.inference_mode() if getattr(block, "keeps_nothing", False) else torch.no_grad()


def _sweep(block: Block, z: Tensor, solver: Solver, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int, int]:
    batch, length, _ = z.shape
    atol = solver.stopping.atol
    max_sweeps = length if solver.stopping.max_sweeps is None else solver.stopping.max_sweeps
    cache = block.init_cache(z, context)
    guess = solver.guess(z)
    x = guess.clone()
    failed = torch.zeros(batch, dtype=torch.bool, device=z.device)
    missed = torch.zeros_like(failed)
    residual = z.new_zeros(batch)
    stops = [0]  # where each sweep's run ended
    segment = -1
    front = 0  # tokens before it are final
    known = 0  # the cache holds the keys of the tokens before known - 1, to within the tolerance
    sweeps = token_evaluations = 0

    while front < length:
        stop = solver.partition.stop(front, length)
        segment += stop > stops[-1]  # which one of `Segments` this is: their ends differ
        stops.append(stop)
        g = block.update(x, z, known, stop, cache)[:, front - known :]
        sweeps += 1
        token_evaluations += batch * (stop - known)
        if stop - front == 1:
            x[:, front:stop] = g
            front = known = stop
            continue

        old = x[:, front:stop]
        change = (g - old).abs().amax(dim=-1)
        new = solver.correction(old, g, front)
        finite = torch.isfinite(new).all(dim=-1) & torch.isfinite(change)
        x[:, front:stop] = torch.where(finite.unsqueeze(-1), new, guess[:, front:stop])
        failed |= ~finite[:, 0]
        if atol is None:
            settled, lead = torch.zeros_like(finite), 0
        else:
            settled = (change <= atol).cumprod(dim=1).bool()
            residual = torch.maximum(residual, change.masked_fill(~settled, 0).amax(dim=1))
            # A sample that has failed is to be solved again: the others do not wait for it.
            lead = int(settled.sum(dim=1).masked_fill(failed, stop - front).min())
        advance = min(lead + 1, stop - front)
        known = front + advance

        limit = max_sweeps[segment] if isinstance(max_sweeps, tuple) else max_sweeps
        if len(stops) > limit and stops[-limit] > known:
            advance = stops[-limit] - front
            final = F.pad(settled[:, :-1], (1, 0), value=True)  # all tokens before it are settled
            left = change.masked_fill(final, 0)[:, :advance]
            residual = torch.maximum(residual, left.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=1))
            missed |= ~(final | settled)[:, :advance].all(dim=1)
        failed |= ~finite[:, :advance].all(dim=1)
        front += advance

    failed |= ~torch.isfinite(x).all(dim=(1, 2))
    status = torch.where(missed, int(Status.MAX_SWEEPS), int(Status.CONVERGED)).masked_fill(failed, Status.NONFINITE)
    return x, status, residual.masked_fill(failed, torch.inf), sweeps, token_evaluations
