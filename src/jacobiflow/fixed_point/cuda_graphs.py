"""CUDA graphs for the token loop and for the sweeps of a window: one launch in place of a hundred."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.base import TokensLogDet
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens, row_batches, scatter_run
from jacobiflow.utils.warn import warn_caller

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
                self.steps[end] = self.graphs.capture(partial(self._step, end))
                self.entry.fill_(token)  # a capture has made the step once
            self.steps[end]()
        return self.x.clone()

    def _allocate(self, z: Tensor, context: Context) -> None:
        self.num, self.z, self.x = len(z), z.clone(), z.clone()
        self.rows = torch.arange(len(z), device=z.device)
        self.entry = torch.zeros_like(self.rows)  # the token to solve
        self.cache = self.block.init_cache(self.z, context.clone())
        self.steps: dict[int, Callable[[], None]] = {}
        self.graphs = GraphCapture(z.device)

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
        self.runs: dict[int, Callable[[], Tensor]] = {}
        self.graphs = GraphCapture(x.device)

    def __call__(
        self, x: Tokens, z: Tokens, start: Int[Tensor, " b"], size: int, end: int, cache: Any
    ) -> Float[Tensor, "b n c"]:
        """Returns the block's `update_at`; the next call overwrites the result."""

        def run() -> Tensor:
            g: Tensor = self.block.update_at(self.x, self.z, self.start, self.size, end, self.cache)
            return g

        end = min(math.ceil(end / _SWEEP_BUCKET) * _SWEEP_BUCKET, self.x.shape[1])
        self.start.copy_(start)
        self.uses[end] += 1
        if self.uses[end] <= _CALLS_BEFORE_CAPTURE:
            return run()
        if end not in self.runs:
            self.runs[end] = self.graphs.capture(run)
        return self.runs[end]()


class GraphCapture:
    """Captures steps as CUDA graphs that share memory. Once a capture has failed, steps run without graphs.

    The steps compute on `device`, which need not be PyTorch's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.has_failed = device, False
        self.pool: Any = None

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        """Returns a function that repeats `step`. The result of a graph is overwritten by the next call."""
        if self.has_failed:
            return step
        with torch.cuda.device(self.device):
            # The step runs once before, on another stream: libraries set up at first use what a graph must not have.
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                step()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            try:
                # By default an allocation by any other thread would abort the capture, and the stream would be of the
                # device of the first capture.
                with (
                    _capturing,
                    torch.cuda.graph(graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"),
                ):
                    result = step()
            except RuntimeError as error:
                torch.cuda.set_stream(here)  # `torch.cuda.graph` does so only at the end of a good capture
                self.has_failed = True
                # The end of a bad capture raises an error of its own.
                reason = str(error.__context__ or error).partition("\n")[0]
                warn_caller(f"no CUDA graphs, which makes sampling slower, since a capture failed: {reason}")
                return step
        self.pool = graph.pool()

        def replay() -> T:
            graph.replay()
            return result

        return replay
