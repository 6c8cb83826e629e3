"""CUDA graphs for the token loop and for the sweeps of a window: one launch in place of a hundred."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.base import TokensLogDet
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens, row_batches, scatter_run

T = TypeVar("T")

_TOKEN_BUCKET = 64
"""Positions by which the cache that a token reads grows from graph to graph; the causal mask hides the last of them."""
_SWEEP_BUCKET = 256
"""The same for sweeps, of which there are fewer."""
_CALLS_BEFORE_CAPTURE = 2
"""Calls of a size that run without a graph, since a capture takes time."""
_capturing = threading.Lock()  # a capture waits for the device, which would break the capture of another thread


class TokenLoop:
    """The recurrence x_t = g(x)_t as CUDA graphs, one for each length of the cache that a token reads.

    It is for one solve, since graphs hold the addresses of the weights.
    """

    def __init__(self, block: Any) -> None:
        self.block, self.num = block, 0
        self.pool: Any = None

    def __call__(self, z: Tokens, context: Context, batch_size: int | None) -> TokensLogDet:
        """Returns the solution, and NaN for the sums of log-scales, which are not computed."""
        x = torch.cat([self._solve(z[rows], context[rows]) for rows in row_batches(len(z), batch_size)])
        return x, z.new_full((len(z),), torch.nan)

    def _solve(self, z: Tokens, context: Context) -> Tokens:
        if self.num != len(z):
            self._allocate(z, context)
        self.z.copy_(z)
        self.entry.zero_()
        self.block.reset_rows(self.cache, self.rows, context)
        length = z.shape[1]
        for token in range(length):
            # One more than the positions that the token attends to, with those that the mask hides.
            end = min(math.ceil(max(token, 1) / _TOKEN_BUCKET) * _TOKEN_BUCKET + 1, length)
            if end not in self.steps:
                self.steps[end], _, self.pool = capture(partial(self._step, end), self.pool, self.x.device)
                self.entry -= 1  # the capture has made the step once
            self.steps[end]()
        return self.x.clone()

    def _allocate(self, z: Tensor, context: Context) -> None:
        self.num, self.z, self.x = len(z), z.clone(), z.clone()
        self.rows = torch.arange(len(z), device=z.device)
        self.entry = torch.zeros_like(self.rows)  # the token to solve
        self.cache = self.block.init_cache(self.z, context.clone())
        self.steps: dict[int, Callable[[], None]] = {}
        self.pool = None

    def _step(self, end: int) -> None:
        g = self.block.update_at(self.x, self.z, self.entry, 1, end, self.cache)
        scatter_run(self.x, g, self.entry)
        self.entry += 1


class SweepGraphs:
    """`update_at` of runs of one `size` as CUDA graphs; `x`, `z` and `cache` stay at their addresses."""

    def __init__(self, block: Any, x: Tokens, z: Tokens, cache: Any, size: int) -> None:
        self.block, self.x, self.z, self.cache, self.size = block, x, z, cache, size
        self.start = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.uses: Counter[int] = Counter()
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self.pool: Any = None

    def __call__(
        self, x: Tokens, z: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: Any
    ) -> Float[Tensor, "b n c"]:
        """Returns the block's `update_at`; the next call overwrites the result."""

        def run() -> Tensor:
            return cast(Tensor, self.block.update_at(self.x, self.z, self.start, self.size, end, self.cache))

        end = min(math.ceil(end / _SWEEP_BUCKET) * _SWEEP_BUCKET, self.x.shape[1])
        self.start.copy_(start)
        self.uses[end] += 1
        if self.uses[end] <= _CALLS_BEFORE_CAPTURE:
            return run()
        if end not in self.graphs:
            replay, g, self.pool = capture(run, self.pool, x.device)
            self.graphs[end] = replay, g
        replay, g = self.graphs[end]
        replay()
        return g


def capture(step: Callable[[], T], pool: Any, device: torch.device) -> tuple[Callable[[], None], T, Any]:
    """Returns a function that replays `step`, the place of its result, and the memory pool for the next graph.

    The step computes on `device`, which need not be PyTorch's current one.
    """
    with torch.cuda.device(device):
        # The step runs once before, on another stream: what libraries set up at their first use must not be captured.
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            step()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # By default an allocation by any other thread would abort the capture, and the stream would be of the device
        # of the first capture.
        with _capturing, torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            result = step()
    return graph.replay, result, graph.pool()
