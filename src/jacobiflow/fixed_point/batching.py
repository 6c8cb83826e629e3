"""The driver of the sweep engine: samples enter a batch, are swept, and leave it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacobiflow.blocks.base import supports
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.fixed_point.cuda_graphs import SweepGraphs
from jacobiflow.fixed_point.engine import SweepEngine, SweepState
from jacobiflow.fixed_point.fronts import Fronts
from jacobiflow.fixed_point.guess import WarmStart
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.partition import Whole
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.solver import MaxSweeps, Solver

_MIN_FINISHED_SHARE = 0.25
"""The share of finished samples from which others take their places; copying their keys costs about a sweep."""
_SWEEPS_PER_CHECK = 4
"""Sweeps on a GPU between checks for finished samples; each check synchronises the GPU."""


@dataclass
class SweepResult:
    """The last iterates of all samples in the caller's order, their fronts, and the cost of the sweeps."""

    x: Tokens
    fronts: Fronts
    sweeps: int = 0
    token_evaluations: int = 0

    def store(self, rows: Any, state: SweepState, source: Any) -> None:
        """Stores the samples `source` of a state as the caller's `rows`."""
        self.x[rows] = state.x[source]
        self.fronts.scatter(rows, state.fronts, source)

    def add_cost(self, other: SweepResult | SweepState) -> None:
        """Adds the sweeps and token evaluations of others."""
        self.sweeps += other.sweeps
        self.token_evaluations += other.token_evaluations


def sweep(problem: Problem, solver: Solver, options: SolveOptions) -> SweepResult:
    """Sweeps all samples until their tokens are final, after the solver's sweeps in bfloat16."""
    if not solver.bf16_sweeps:
        return _sweep(problem, solver, options)
    coarse = replace(solver, partition=Whole(), stopping=MaxSweeps(solver.bf16_sweeps))
    first = _sweep(problem, coarse, options, in_bf16=True)
    result = _sweep(problem, replace(solver, guess=WarmStart(first.x), bf16_sweeps=0), options)
    result.add_cost(first)
    result.fronts.sweeps += first.fronts.sweeps
    return result


def _sweep(problem: Problem, solver: Solver, options: SolveOptions, in_bf16: bool = False) -> SweepResult:
    guess = solver.guess(problem.z)
    result = SweepResult(torch.empty_like(guess), Fronts.initial(len(problem), problem.z))
    engine = SweepEngine(problem.block, solver, problem.num_tokens)
    if not engine.shares_front:
        _sweep_and_refill(engine, problem, guess, result, options, in_bf16)
        return result
    for rows, part in problem.batches(options.batch_size):
        state = engine.init(part, guess[rows], in_bf16)
        while not engine.finished(state):
            options.check_time()
            engine.step(state)
        state.fronts.sweeps += state.sweeps
        result.store(rows, state, slice(None))
        result.add_cost(state)
    return result


def _sweep_and_refill(
    engine: SweepEngine, problem: Problem, guess: Tokens, result: SweepResult, options: SolveOptions, in_bf16: bool
) -> None:
    """Sweeps samples with a front each; those that finish leave their places to others that wait."""
    if not len(problem):
        return
    num_entered = min(options.batch_size or len(problem), len(problem))
    samples = np.arange(num_entered)  # in the caller's order, by their place in the batch
    state = engine.init(problem[:num_entered], guess[:num_entered], in_bf16)
    engine = _with_graphs(engine, state)
    while len(samples):
        options.check_time()
        engine.step(state)
        if state.x.is_cuda and state.sweeps % _SWEEPS_PER_CHECK:
            continue
        front = state.fronts.front.cpu().numpy()
        places = (front >= engine.num_tokens).nonzero()[0]
        if len(places) >= _MIN_FINISHED_SHARE * len(front):
            result.store(_to_index(samples[places], state), state, _to_index(places, state))
            rows = slice(num_entered, min(num_entered + len(places), len(problem)))
            num_entered, num_new = rows.stop, rows.stop - rows.start
            if num_new:
                samples[places[:num_new]] = np.arange(rows.start, rows.stop)
                _refill(engine, state, _to_index(places[:num_new], state), problem[rows], guess[rows])
            front = np.concatenate((front[front < engine.num_tokens], np.zeros(num_new, dtype=front.dtype)))
            if num_new < len(places) and len(front):
                samples = _compact(engine, state, samples, places[num_new:])
                engine = _with_graphs(engine, state)
            elif not len(front):
                break
        state.min_front, state.max_front = int(front.min()), int(front.max())
    result.add_cost(state)


def _refill(engine: SweepEngine, state: SweepState, places: Tensor, new: Problem, guess: Tokens) -> None:
    """Puts new samples at the `places` of finished ones, whose memory they take."""
    engine.block.reset_rows(state.cache, places, new.context)
    state.problem.z[places], state.x[places], state.guess[places] = new.z, guess, guess
    state.fronts.scatter(places, Fronts.initial(len(places), new.z), slice(None))


def _compact(engine: SweepEngine, state: SweepState, samples: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Removes the samples at `places`, into which the last ones move; returns the samples that stay."""
    num = len(samples) - len(places)
    source, target = np.setdiff1d(np.arange(num, len(samples)), places), places[places < num]
    samples[target] = samples[source]
    rows, new_rows = _to_index(source, state), _to_index(target, state)
    for tensor in (state.x, state.problem.z, state.guess):
        tensor[new_rows] = tensor[rows]
    state.fronts.scatter(new_rows, state.fronts, rows)
    state.cache = engine.block.move_rows(state.cache, rows, new_rows, num)
    state.problem, state.fronts = state.problem[:num], state.fronts.first(num)
    state.x, state.guess = state.x[:num], state.guess[:num]
    return samples[:num]


def _with_graphs(engine: SweepEngine, state: SweepState) -> SweepEngine:
    """The engine with CUDA graphs of the sweeps of a state, if the block allows them and runs are of one size."""
    partition: Any = engine.solver.partition
    size = partition.run_size(engine.num_tokens)
    if not state.x.is_cuda or not supports(engine.block, "graph_safe") or size >= engine.num_tokens:
        return engine
    return replace(
        engine, update_at=SweepGraphs(engine.block, state.x, state.problem.z, state.cache, size), run_size=size
    )


def _to_index(rows: np.ndarray, state: SweepState) -> Tensor:
    return torch.from_numpy(rows).to(state.x.device)
