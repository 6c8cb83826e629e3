"""The driver of the sweep engine: samples enter a batch, are swept, and leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacobiflow.blocks.base import supports
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point.cuda_graphs import SweepGraphs
from jacobiflow.fixed_point.engine import SweepEngine, SweepState
from jacobiflow.fixed_point.fronts import Fronts
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solver import Solver

_MIN_FINISHED_SHARE = 0.25
"""The share of finished samples from which others take their places; copying their keys costs about a sweep."""
_SWEEPS_PER_CHECK = 4
"""Sweeps on a GPU between checks for finished samples; each check synchronises the GPU."""


@dataclass
class SweepResult:
    """The last iterates and the fronts of all samples in the caller's order, and the cost of their sweeps.

    Attributes:
        num_entered: The samples that have entered a batch; the others wait.
    """

    x: Tokens
    fronts: Fronts
    sweeps: int = 0
    token_evaluations: int = 0
    num_entered: int = 0

    def enter(self, num: int) -> slice:
        """Returns the next samples that enter a batch, at most `num`."""
        start, self.num_entered = self.num_entered, min(self.num_entered + num, len(self.x))
        return slice(start, self.num_entered)

    def store(self, rows: Any, state: SweepState, source: Any) -> None:
        """Stores the samples `source` of a state as the caller's `rows`."""
        self.x[rows] = state.x[source]
        self.fronts.scatter(rows, state.fronts, source)


def sweep(problem: Problem, solver: Solver, options: SolveOptions, in_bf16: bool = False) -> SweepResult:
    """Sweeps all samples until their tokens are final; `in_bf16` runs the network in bfloat16."""
    max_change = None if options.tolerance is None else solver.tolerance_factor * options.tolerance
    engine = SweepEngine(problem.block, solver, problem.num_tokens, max_change)
    start = solver.guess.start(problem, solver.correction, options)
    x, fronts = torch.empty_like(start.x), Fronts.initial(len(problem), problem.z)
    result = SweepResult(x, fronts, start.sweeps, start.token_evaluations)
    while result.num_entered < len(problem):
        rows = result.enter(options.batch_size or len(problem))
        state = engine.init(problem[rows], start.x[rows], rows.start, in_bf16)
        if not engine.shares_front:
            _use_graphs(engine, state)
        while not engine.finished(state):
            options.check_time()
            engine.step(state)
            if not engine.shares_front:
                _swap_finished(engine, state, problem, start.x, result)
        if engine.shares_front:
            state.fronts.sweeps += state.sweeps
            result.store(rows, state, slice(None))
        result.sweeps += state.sweeps
        result.token_evaluations += state.token_evaluations
    result.fronts.sweeps += start.sample_sweeps
    return result


def _swap_finished(
    engine: SweepEngine, state: SweepState, problem: Problem, guess: Tokens, result: SweepResult
) -> None:
    """Lets finished samples leave and others take their places; brings the bounds of the fronts up to date."""
    if state.x.is_cuda and state.sweeps % _SWEEPS_PER_CHECK:
        return
    front = state.fronts.front.cpu().numpy()
    places = (front >= engine.num_tokens).nonzero()[0]
    if len(places) >= _MIN_FINISHED_SHARE * len(front):
        result.store(_to_index(state.samples[places], state), state, _to_index(places, state))
        rows = result.enter(len(places))
        num_new = rows.stop - rows.start
        front = np.concatenate((front[front < engine.num_tokens], np.zeros(num_new, dtype=front.dtype)))
        if not len(front):
            state.min_front = engine.num_tokens
            return
        if num_new:
            state.samples[places[:num_new]] = np.arange(rows.start, rows.stop)
            _refill(engine, state, _to_index(places[:num_new], state), problem[rows], guess[rows])
        if num_new < len(places):
            _compact(engine, state, places[num_new:])
    state.min_front, state.max_front = int(front.min()), int(front.max())


def _refill(engine: SweepEngine, state: SweepState, places: Tensor, new: Problem, guess: Tokens) -> None:
    """Puts new samples at the `places` of finished ones, whose memory they take."""
    engine.block.reset_rows(state.cache, places, new.context)
    state.z[places], state.x[places], state.guess[places] = new.z, guess, guess
    state.fronts.scatter(places, Fronts.initial(len(places), new.z), slice(None))


def _compact(engine: SweepEngine, state: SweepState, places: np.ndarray) -> None:
    """Removes the samples at `places`, into which the last ones move."""
    num = len(state.samples) - len(places)
    source, target = np.setdiff1d(np.arange(num, len(state.samples)), places), places[places < num]
    state.samples[target] = state.samples[source]
    rows, new_rows = _to_index(source, state), _to_index(target, state)
    for tensor in (state.x, state.z, state.guess):
        tensor[new_rows] = tensor[rows]
    state.fronts.scatter(new_rows, state.fronts, rows)
    state.cache = engine.block.move_rows(state.cache, rows, new_rows, num)
    state.samples, state.fronts = state.samples[:num], state.fronts.first(num)
    state.x, state.z, state.guess = state.x[:num], state.z[:num], state.guess[:num]
    _use_graphs(engine, state)


def _use_graphs(engine: SweepEngine, state: SweepState) -> None:
    """Replaces the block's `update_at` by CUDA graphs, if it allows them and all runs are of one size."""
    partition: Any = engine.solver.partition
    size = partition.run_size(engine.num_tokens)
    if state.x.is_cuda and supports(engine.block, "graph_safe") and size < engine.num_tokens:
        state.update_at = SweepGraphs(engine.block, state.x, state.z, state.cache, size)
        state.run_size = size


def _to_index(rows: np.ndarray, state: SweepState) -> Tensor:
    return torch.from_numpy(rows).to(state.x.device)
