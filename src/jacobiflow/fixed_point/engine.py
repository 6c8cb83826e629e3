"""A batch of samples that are swept together, and the queue from which they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.tokens import Tokens, gather_run, scatter_run
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.progress import SampleProgress
from jacobiflow.fixed_point.solver import Solver
from jacobiflow.utils.checks import format_value


class SampleQueue:
    """The samples of a problem: those that wait, and the answers of those that are finished.

    Attributes:
        guess: The start of each sample.
        x: The last iterates of finished samples.
        progress: The progress of finished samples.
    """

    def __init__(self, problem: Problem, guess: Tokens) -> None:
        self.problem, self.guess = problem, guess
        self.x, self.progress = torch.empty_like(guess), SampleProgress.initial(len(problem), problem.z)
        self._num_taken = 0

    @property
    def has_waiting(self) -> bool:
        """True if samples wait."""
        return self._num_taken < len(self.problem)

    def take(self, num: int) -> slice:
        """Returns the rows of the next samples, at most `num`."""
        start, self._num_taken = self._num_taken, min(self._num_taken + num, len(self.problem))
        return slice(start, self._num_taken)

    def store(self, rows: Any, batch: SweepBatch, source: Any) -> None:
        """Stores the samples `source` of a batch as the answers of `rows`."""
        self.x[rows] = batch.x[source]
        self.progress.scatter(rows, batch.progress, source)


class SweepBatch(ABC):
    """Samples that are swept together until all of their tokens are final.

    A sweep replaces x by g(x) on the run [front, stop) of each sample, where the partition chooses the stop. Then the
    front passes the tokens that are final.

    Args:
        queue: Gives the samples, and gets their answers.
        rows: The samples of the batch.
        max_change: A token is final when a sweep changes it, and all tokens before it, by at most this. With `None`
            only the solver's rules end its sweeps.
        in_bf16: Whether the network runs in bfloat16.

    Attributes:
        z: Inputs of the block (B, T, C).
        x: Iterates (B, T, C).
        guess: Values that replace entries which overflow.
        cache: The block's cache.
        progress: The progress of each sample.
        sweeps: Sweeps so far.
        token_evaluations: Tokens times samples over these sweeps.
    """

    def __init__(
        self, queue: SampleQueue, rows: slice, solver: Solver, max_change: float | None, in_bf16: bool
    ) -> None:
        problem: Any = queue.problem[rows]
        self.block, self.num_tokens = problem.block, problem.num_tokens
        self.solver, self.max_change = solver, max_change
        self.z, self.x, self.guess = problem.z.clone(), queue.guess[rows].clone(), queue.guess[rows].clone()
        cache = self.block.init_cache(self.z, problem.context.clone())
        self.cache = self.block.to_bf16(cache) if in_bf16 else cache
        self.progress = SampleProgress.initial(len(problem), self.z)
        self.sweeps = self.token_evaluations = 0

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """True if all samples have passed their last token."""

    @abstractmethod
    def step(self) -> None:
        """Sweeps the run at the front of each sample once, and moves the fronts."""

    @abstractmethod
    def exchange(self, queue: SampleQueue) -> None:
        """Stores finished samples; others may take their places."""

    def _run_stop(self, front: int) -> int:
        partition = self.solver.partition
        stop = partition.stop(front, self.num_tokens)
        if not front < stop <= self.num_tokens:
            raise InputValueError(f"{partition!r}: a run from token {front} to {stop}, of {self.num_tokens} tokens")
        return stop

    def _update(self, start: int, stop: int) -> Float[Tensor, "b n c"]:
        """Returns g(x)[:, start:stop], by the block's `update`."""
        g: Tensor = self.block.update(self.x, self.z, start, stop, self.cache)
        self._count_sweep(stop - start)
        shape = (len(self.x), stop - start, self.x.shape[2])
        if g.shape != shape:
            raise InputValueError(f"update returned {format_value(g)}: a block returns g of each entry, here {shape}")
        return g

    def _count_sweep(self, size: int) -> None:
        self.sweeps += 1
        self.token_evaluations += len(self.x) * size

    def _iterate(
        self, start: int | Int[Tensor, " b"], old: Float[Tensor, "b n c"], g: Float[Tensor, "b n c"]
    ) -> Float[Tensor, "b n"]:
        """Sets the runs at `start` to g, and tokens that overflow to the guess; returns |g - old| of each token."""
        self.progress.exact.fill_(False)
        residual = (g - old).abs_().amax(dim=-1)
        guess = gather_run(self.guess, start, g.shape[1])
        scatter_run(self.x, torch.where(residual.isfinite().unsqueeze(-1), g, guess), start)
        return residual
