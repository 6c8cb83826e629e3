"""The sweep engine: a state, `init`, `step` and `finished`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.base import supports
from jacobiflow.blocks.tokens import Tokens, gather_run, scatter_run
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.fronts import Fronts, SweepChanges
from jacobiflow.fixed_point.partition import SlidingRun
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solver import Solver, Stopping
from jacobiflow.utils.checks import format_value

UpdateAt = Callable[..., Float[Tensor, "b n c"]]
"""`update_at` of a block, or of CUDA graphs that replay it."""


@dataclass
class SweepState:
    """The samples that are swept together.

    Attributes:
        z: Inputs of the block (B, T, C).
        x: Iterates (B, T, C).
        guess: Values that replace entries which overflow.
        cache: The block's cache.
        fronts: The front of each sample, and the progress of its solve.
        sweeps_left: Sweeps that each token (T,) may still have.
        min_front: No front is before this token.
        max_front: No front is after this token.
        samples: Their indices in the caller's order.
        num_outdated_keys: Tokens before a shared front whose keys are a sweep behind.
        sweeps: Sweeps so far.
        token_evaluations: Tokens times samples over these sweeps.
        update_at: The block's, or CUDA graphs of it for this state's memory.
        run_size: The size of every run, at the end of the sequence too; `None` for runs that may be shorter there.
    """

    z: Tokens
    x: Tokens
    guess: Tokens
    cache: Any
    fronts: Fronts
    sweeps_left: np.ndarray
    samples: np.ndarray
    min_front: int = 0
    max_front: int = 0
    num_outdated_keys: int = 0
    sweeps: int = 0
    token_evaluations: int = 0
    update_at: UpdateAt | None = None
    run_size: int | None = None


@dataclass(frozen=True)
class SweepEngine:
    """Sweeps of a block by a solver: `init` makes a state, `step` sweeps it once, until all its samples are `finished`.

    Attributes:
        block: Gives g.
        num_tokens: T.
        max_change: A token is final when a sweep changes it, and all tokens before it, by at most this. With `None`
            only the solver's rules end its sweeps.
    """

    block: Any
    solver: Solver
    num_tokens: int
    max_change: float | None

    @cached_property
    def shares_front(self) -> bool:
        """True if all samples have one front; False if each has its own."""
        slides = isinstance(self.solver.partition, SlidingRun) and self.solver.stopping == Stopping()
        return not (slides and supports(self.block, "per_sample_front"))

    def init(self, problem: Problem, guess: Tokens, start: int, in_bf16: bool) -> SweepState:
        """Returns the state of samples at their first token, from the caller's `start` on. It owns its tensors."""
        z = problem.z.clone()
        cache = self.block.init_cache(z, problem.context.clone())
        return SweepState(
            z=z,
            x=guess.clone(),
            guess=guess.clone(),
            cache=self.block.to_bf16(cache) if in_bf16 else cache,
            fronts=Fronts.initial(len(problem), z),
            sweeps_left=_max_sweeps_per_token(self.solver, self.num_tokens),
            samples=np.arange(start, start + len(problem)),
        )

    def finished(self, state: SweepState) -> bool:
        """Returns whether all samples have passed their last token."""
        return state.min_front >= self.num_tokens

    def step(self, state: SweepState) -> None:
        """Sweeps the run at the front of each sample once, and moves the fronts; changes the state in place."""
        fronts = state.fronts
        if not self.shares_front:
            fronts.sweeps += fronts.front < self.num_tokens
        start, size, g = self._evaluate(state)
        old = gather_run(state.x, start, size)
        if state.max_front > self.num_tokens - size:  # such a run starts before the front, to stay in the sequence
            is_final = torch.arange(size, device=g.device) < (fronts.front - start)[:, None]
            g = torch.where(is_final.unsqueeze(-1), old, g)
        num_accepted: int | Tensor = 1
        if size == 1:
            scatter_run(state.x, g, start)
        else:
            changes = self._update_run(state, start, old, g)
            num_accepted = fronts.count_accepted(changes, self.max_change)
            if self.shares_front:
                num_accepted, state.num_outdated_keys = fronts.count_accepted_together(
                    changes, self.max_change, num_accepted, self._count_sweep(state, size)
                )
        self._move_fronts(state, start, size, num_accepted)

    def _evaluate(self, state: SweepState) -> tuple[int | Tensor, int, Tensor]:
        """The start of the runs, one number if it is common to all samples; their size; and g there."""
        front, outdated = state.min_front, state.num_outdated_keys
        size = self._run_stop(front) - front if state.run_size is None else state.run_size
        state.sweeps += 1
        state.token_evaluations += len(state.x) * (size + outdated)
        last_start = self.num_tokens - size
        if state.run_size is None and front in (state.max_front, last_start):
            g = self.block.update(state.x, state.z, front - outdated, front + size, state.cache)
            state.num_outdated_keys = 0
            if g.shape != (len(state.x), size + outdated, state.x.shape[2]):
                shape = tuple(state.x[:, front - outdated : front + size].shape)
                raise InputValueError(
                    f"update returned {format_value(g)}: a block returns g of each entry, here {shape}"
                )
            return front, size, g[:, outdated:]
        start = state.fronts.front if state.max_front <= last_start else state.fronts.front.clamp(max=last_start)
        end = min(state.max_front + size, self.num_tokens)
        update_at = state.update_at or self.block.update_at
        return start, size, update_at(state.x, state.z, start, size, end, state.cache)

    def _run_stop(self, front: int) -> int:
        partition = self.solver.partition
        stop = partition.stop(front, self.num_tokens)
        if not front < stop <= self.num_tokens:
            raise InputValueError(f"{partition!r}: a run from token {front} to {stop}, of {self.num_tokens} tokens")
        return stop

    def _update_run(
        self, state: SweepState, start: int | Tensor, old: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]
    ) -> SweepChanges:
        """Sets the run of each sample to its next iterate, and entries that overflow to the guess."""
        state.fronts.exact.fill_(False)
        new = self.solver.correction(old, g)
        if new is g:
            residual = change = (g - old).abs_().amax(dim=-1)
        else:
            residual, correction_step = (torch.stack((g, new)) - old).abs_().amax(dim=-1)
            change = torch.maximum(residual, correction_step)
            fails = state.fronts.update_correction_state(start, residual)[:, None]
            new = torch.where(fails[:, None], g, new)
            change = torch.where(fails, residual, change)
        ebound = self.solver.stopping.ebound
        is_early = ebound is not None and bool((new - old).norm() <= ebound * state.x.numel())
        guess = gather_run(state.guess, start, change.shape[1])
        scatter_run(state.x, torch.where(change.isfinite().unsqueeze(-1), new, guess), start)
        return SweepChanges(residual, change, is_early)

    def _count_sweep(self, state: SweepState, size: int) -> int:
        """Counts a sweep of the tokens of a shared run; returns how many of its leading tokens have none left."""
        run = slice(state.min_front, state.min_front + size)
        state.sweeps_left[run] -= 1
        return int(np.logical_and.accumulate(state.sweeps_left[run] <= 0).sum())

    def _move_fronts(self, state: SweepState, start: int | Tensor, size: int, num_accepted: int | Tensor) -> None:
        """Moves each front past `num_accepted` tokens of its run; samples that overflowed are finished."""
        if self.shares_front:
            state.min_front = state.max_front = state.min_front + int(num_accepted)
        else:
            state.max_front = min(state.max_front + size, self.num_tokens)
            front = state.fronts.front.clamp(min=start + num_accepted)
            state.fronts.front = front.masked_fill(state.fronts.nonfinite, self.num_tokens)


def _max_sweeps_per_token(solver: Solver, num_tokens: int) -> np.ndarray:
    """The largest number of sweeps of each token; as many as there are tokens suffice."""
    counts = solver.stopping.max_sweeps
    if not isinstance(counts, tuple):
        return np.full(num_tokens, min(counts or num_tokens, num_tokens))
    _, segment = np.unique([solver.partition.stop(t, num_tokens) for t in range(num_tokens)], return_inverse=True)
    return np.array([min(count, num_tokens) for count in counts])[segment]
