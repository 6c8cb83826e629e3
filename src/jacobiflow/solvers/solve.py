"""`solve`: the fixed point of a block by sweeps."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.checks import check_count, check_finite, check_kind, check_on, check_rows, short
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.flows.base import Block, ExactInverse, KeepsNothing, LowPrecision, Replayable
from jacobiflow.solvers.fronts import Tally
from jacobiflow.solvers.guess import Given
from jacobiflow.solvers.loop import Loop
from jacobiflow.solvers.partition import Whole
from jacobiflow.solvers.replay import replayed
from jacobiflow.solvers.solution import Solution, Status
from jacobiflow.solvers.solver import Solver
from jacobiflow.solvers.stopping import MaxSweeps


def solve(
    block: Block, z: Float[Tensor, "b t c"], solver: Solver, context: Tensor | None = None, slots: int | None = None
) -> Solution:
    """Solve x = g(x) for the inverse of `block` at `z`, by sweeps x <- g(x) over runs of tokens.

    A sweep evaluates g on the run [front, stop) that the partition chooses, and sets the run to it, or to what the
    correction makes of it. Then the front goes past the leading tokens that the sweep changed by at most the
    tolerance, and past one more: all tokens that it was computed from are final, to within the tolerance, so it is too
    (Proposition 1). T sweeps always suffice. A token that has had `max_sweeps` sweeps is passed as it is; keys in the
    cache that this leaves a sweep behind are computed again by the next sweep. Keys of tokens passed by tolerance are
    those of the value before the last sweep.

    Where a partition whose run slides (`Whole`, `Window`) stops on a tolerance and the block allows it
    (`FrontPerSample`), each sample has a front of its own, and samples that have finished leave the batch; else the
    batch shares one front, which waits for the slowest.

    Where every run is one token and the block has a recurrence of its own (`ExactInverse`), that is called instead. On
    a GPU, where the block allows it (`Replayable`), the kernels of a token are launched as one graph.

    A value that overflows is set back to the guess. A sample that had one when the front passed it ends as
    `Status.NONFINITE`; nothing here hides that, and `solve_certified` acts on it. A sample whose residual keeps growing
    under a correction is swept plainly from there on.

    **Arguments:** `block` gives g, `z` (B, T, C) is its input in its own causal order, `context` has a row per sample
    (labels, say) or is `None`. At most `slots` samples are swept at a time, all by default; the next ones enter as
    others finish (continuous batching).

    **Returns:** a `Solution`, uncertified.

    **Raises:** `ValueError` where `z` is not finite or not (B, T, C), `context` has not a row for each of its rows, a
    piece of the solver does not fit T and C, or the block has no bfloat16 network (`LowPrecision`) for coarse sweeps.
    `TypeError` for other kinds, and where `z` is of a dtype that the state cannot have.
    """
    slots = _check(block, z, solver, context, slots)
    started = time.perf_counter()
    with no_gradients(block):
        done = _recurrence(block, z, solver, context, slots) or _sweeps(block, z, solver, context, slots)
        failed = done.tally.failed | ~torch.isfinite(done.x).all(dim=(1, 2)).cpu().numpy()
    status = np.where(failed, Status.NONFINITE, np.where(done.tally.missed, Status.MAX_SWEEPS, Status.CONVERGED))

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(z.device)

    return Solution(
        x=done.x.clone(),  # outside inference mode, so that autograd takes it
        status=on_device(status.astype(np.int64)),
        residual=on_device(np.where(failed, np.inf, done.tally.residual)).to(z),
        exact=on_device(done.tally.exact),
        resolved_sequentially=torch.zeros(len(z), dtype=torch.bool, device=z.device),
        sample_sweeps=on_device(done.tally.sweeps),
        sweeps=done.sweeps,
        network_calls=done.sweeps,
        token_evaluations=done.token_evaluations,
        seconds=time.perf_counter() - started,
    )


def check_tokens(block: Block, z: Tensor, context: Tensor | None, **others: Tensor) -> None:
    """**Raises** `TypeError` or `ValueError` where `block` is none, `z` and `others` are no tokens (B, T, C) of one
    shape in float32 or float64, or `context` has not a row for each of theirs.
    """
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


def _check(block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int | None) -> int:
    """The slots: by default one for each row of `z`. **Raises** as `solve` does."""
    check_tokens(block, z, context)
    check_finite("z", z)
    check_kind("solver", solver, Solver, "a Solver, such as Solver(Whole())")
    slots = max(len(z), 1) if slots is None else check_count("slots", slots)
    solver.check(*z.shape[1:])
    if solver.coarse and not isinstance(block, LowPrecision):
        raise InputValueError(f"coarse={solver.coarse}: {type(block).__name__} has no bfloat16 network; give 0")
    return slots


class _Done(NamedTuple):
    """The answer, what became of each sample, and what it cost."""

    x: Tensor
    tally: Tally
    sweeps: int
    token_evaluations: int


def _recurrence(block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int) -> _Done | None:
    """The loop of a `solver` that is one, where there is a faster one than sweeps; it counts as that many of them.

    It is the block's own recurrence, or on a GPU graphs of its kernels.
    """
    length = z.shape[1]
    if len(z) == 0 or not solver.partition.token_by_token(length):
        return None
    x = _own_recurrence(block, z, context, slots) if isinstance(block, ExactInverse) else None
    if x is None and z.device.type == "cuda" and isinstance(block, Replayable):
        x = replayed(block, z, context, slots)
    if x is None:
        return None
    tally = Tally(len(z))
    tally.sweeps += length
    return _Done(x, tally, length * -(-len(z) // slots), length * len(z))


def _own_recurrence(block: ExactInverse, z: Tensor, context: Tensor | None, slots: int) -> Tensor | None:
    parts = []
    for first in range(0, len(z), slots):
        rows = slice(first, first + slots)
        part = block.exact_inverse(z[rows], None if context is None else context[rows])
        if part is None:
            return None
        parts.append(part)
    return torch.cat(parts)


def _sweeps(block: Block, z: Tensor, solver: Solver, context: Tensor | None, slots: int) -> _Done:
    """Sweeps in bfloat16 if `solver` has any, then those from their answer."""
    loops = []
    if solver.coarse:
        coarse = replace(solver, partition=Whole(), stopping=MaxSweeps(solver.coarse))
        loops.append(Loop(block, z, coarse, context, slots, low_precision=True))
        loops[0].run()
        solver = replace(solver, guess=Given(loops[0].x))
    loops.append(Loop(block, z, solver, context, slots))
    loops[-1].run()
    x, tally = loops[-1].x, loops[-1].tally
    tally.sweeps = np.sum([loop.tally.sweeps for loop in loops], axis=0)
    return _Done(x, tally, sum(loop.sweeps for loop in loops), sum(loop.token_evaluations for loop in loops))


def no_gradients(block: Block) -> AbstractContextManager[None]:
    """Inference mode, a tenth faster where a step is small, for a block that keeps no tensor; else no_grad.

    A tensor that a block keeps from inference mode (a mask made on first use, say) could not be trained with later.
    """
    return torch.inference_mode() if isinstance(block, KeepsNothing) else torch.no_grad()
