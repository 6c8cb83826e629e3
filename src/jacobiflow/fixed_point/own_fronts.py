"""A batch of samples each of which has a front of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.tokens import gather_run, scatter_run
from jacobiflow.fixed_point.cuda_graphs import SweepGraphs
from jacobiflow.fixed_point.engine import SampleQueue, SweepBatch
from jacobiflow.fixed_point.progress import SampleProgress
from jacobiflow.fixed_point.solver import Solver

_MIN_FINISHED_SHARE = 0.25
"""The share of finished samples from which others take their places; the keys of the rest are copied then."""
_SWEEPS_PER_CHECK = 4
"""Sweeps on a GPU between checks for finished samples; each check synchronises the GPU."""


class OwnFronts(SweepBatch):
    """Samples that each have a front of their own. Finished ones leave, and others take their places.

    The block is an `AttentionBlock`, and the partition a `SlidingRun`. Only the tolerance ends sweeps.
    """

    def __init__(
        self, queue: SampleQueue, rows: slice, solver: Solver, max_change: float | None, in_bf16: bool
    ) -> None:
        super().__init__(queue, rows, solver, max_change, in_bf16)
        self._front: Int[Tensor, " b"] = torch.zeros_like(self.progress.sweeps)
        self._samples = np.arange(rows.start, rows.stop)  # in the caller's order
        self._min_front = self._max_front = 0  # bounds of the fronts, which a GPU is not asked for in every sweep
        self._use_graphs()

    @property
    def is_finished(self) -> bool:
        return self._min_front >= self.num_tokens

    def step(self) -> None:
        self.progress.sweeps += self._front < self.num_tokens
        start, size, g = self._evaluate()
        old = gather_run(self.x, start, size)
        if self._max_front > self.num_tokens - size:  # such a run starts before the front, to stay in the sequence
            is_final = torch.arange(size, device=g.device) < (self._front - start)[:, None]
            g = torch.where(is_final.unsqueeze(-1), old, g)
        num_accepted: int | Tensor = 1
        if size == 1:
            scatter_run(self.x, g, start)
        else:
            num_accepted = self.progress.count_accepted(self._iterate(start, old, g), self.max_change)
        front = self._front.clamp(min=start + num_accepted)
        self._front = front.masked_fill(self.progress.nonfinite, self.num_tokens)  # a sample that overflowed leaves
        self._max_front = min(self._max_front + size, self.num_tokens)

    def _evaluate(self) -> tuple[int | Tensor, int, Float[Tensor, "b n c"]]:
        """Returns the start of the runs, one number if it is common to all samples; their size; and g there."""
        front = self._min_front
        size = self._run_size or self._run_stop(front) - front
        last_start = self.num_tokens - size
        if self._run_size is None and front in (self._max_front, last_start):
            return front, size, self._update(front, front + size)
        start = self._front if self._max_front <= last_start else self._front.clamp(max=last_start)
        end = min(self._max_front + size, self.num_tokens)
        self._count_sweep(size)
        return start, size, self._update_at(self.x, self.z, start, size, end, self.cache)

    def exchange(self, queue: SampleQueue) -> None:
        if self.x.is_cuda and self.sweeps % _SWEEPS_PER_CHECK:
            return
        front = self._front.cpu().numpy()
        places = (front >= self.num_tokens).nonzero()[0]
        if len(places) >= _MIN_FINISHED_SHARE * len(front):
            queue.store(self._to_index(self._samples[places]), self, self._to_index(places))
            rows = queue.take(len(places))
            num_new = rows.stop - rows.start
            front = np.concatenate((front[front < self.num_tokens], np.zeros(num_new, dtype=front.dtype)))
            if not len(front):
                self._min_front = self.num_tokens
                return
            if num_new:
                self._replace(places[:num_new], queue, rows)
            if num_new < len(places):
                self._remove(places[num_new:])
        self._min_front, self._max_front = int(front.min()), int(front.max())

    def _replace(self, places: np.ndarray, queue: SampleQueue, rows: slice) -> None:
        """Puts new samples at the places of finished ones, whose memory they take."""
        self._samples[places] = np.arange(rows.start, rows.stop)
        new, guess, index = queue.problem[rows], queue.guess[rows], self._to_index(places)
        self.block.reset_rows(self.cache, index, new.context)
        self.z[index], self.x[index], self.guess[index], self._front[index] = new.z, guess, guess, 0
        self.progress.scatter(index, SampleProgress.initial(len(places), new.z), slice(None))

    def _remove(self, places: np.ndarray) -> None:
        """Removes the samples at some places, into which the last ones move."""
        num = len(self._samples) - len(places)
        source, target = np.setdiff1d(np.arange(num, len(self._samples)), places), places[places < num]
        self._samples[target] = self._samples[source]
        rows, new_rows = self._to_index(source), self._to_index(target)
        for tensor in (self.x, self.z, self.guess, self._front):
            tensor[new_rows] = tensor[rows]
        self.progress.scatter(new_rows, self.progress, rows)
        self.cache = self.block.move_rows(self.cache, rows, new_rows, num)
        self._samples, self._front, self.progress = self._samples[:num], self._front[:num], self.progress.first(num)
        self.x, self.z, self.guess = self.x[:num], self.z[:num], self.guess[:num]
        self._use_graphs()

    def _use_graphs(self) -> None:
        """On a GPU replays `update_at` of the block as CUDA graphs; all runs then have one size."""
        partition: Any = self.solver.partition
        size = partition.run_size(self.num_tokens)
        self._update_at: Callable[..., Tensor] = self.block.update_at
        self._run_size: int | None = None
        if self.x.is_cuda and size < self.num_tokens:
            self._update_at = SweepGraphs(self.block, self.x, self.z, self.cache, size)
            self._run_size = size

    def _to_index(self, places: np.ndarray) -> Tensor:
        return torch.from_numpy(places).to(self.x.device)
