"""CUDA graphs for the token loop and for the sweeps of a window: one launch instead of a hundred kernels."""

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

from jacobiflow.blocks.base import put_run

T = TypeVar("T")

_BUCKET = 64  # positions by which the context grows from graph to graph; the causal mask hides the last of them
_SWEEPS = 256  # the same for sweeps, of which there are fewer
_USES = 2  # calls before one is captured, which takes about as long as two
_capturing = threading.Lock()  # a capture waits for the device, which would break one that another thread has begun


class TokenLoop:
    """The recurrence x_t = g(x)_t as a graph for each context, for one solve: graphs hold the addresses of weights."""

    def __init__(self, block: Any) -> None:
        self.block, self.num = block, 0
        self.pool: Any = None

    def __call__(
        self, z: Float[Tensor, "b t c"], context: Tensor | None
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, " b"]]:
        """Returns the solution, and NaN for the sums of log-scales, which are not computed."""
        if self.num != len(z):
            self._allocate(z, context)
        self.z.copy_(z)
        self.entry.zero_()
        self.block.refill(self.cache, self.rows, context)
        length = z.shape[1]
        for token in range(length):
            # One more than the positions that the token attends to, the hidden ones included.
            end = min(math.ceil(max(token, 1) / _BUCKET) * _BUCKET + 1, length)
            if end not in self.steps:
                self.steps[end], _, self.pool = capture(partial(self._step, end), self.pool)
                self.entry -= 1  # the capture has made the step once
            self.steps[end]()
        return self.x.clone(), z.new_full((len(z),), torch.nan)

    def _allocate(self, z: Tensor, context: Tensor | None) -> None:
        self.num, self.z, self.x = len(z), z.clone(), z.clone()
        self.rows = torch.arange(len(z), device=z.device)
        self.entry = torch.zeros_like(self.rows)  # the token to solve
        self.cache = self.block.init_cache(self.z, None if context is None else context.clone())
        self.steps: dict[int, Callable[[], None]] = {}
        self.pool = None

    def _step(self, end: int) -> None:
        g = self.block.update_at(self.x, self.z, self.entry, 1, end, self.cache)
        put_run(self.x, g, self.entry)
        self.entry += 1


class SweepGraphs:
    """`update_at` of runs of one `size`, as a graph for each context; `x`, `z` and `cache` keep their memory."""

    def __init__(self, block: Any, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], cache: Any, size: int) -> None:
        self.block, self.x, self.z, self.cache, self.size = block, x, z, cache, size
        self.start = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.uses: Counter[int] = Counter()
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self.pool: Any = None

    def __call__(self, start: Int[Tensor, " b"], end: int) -> Float[Tensor, "b n c"]:
        """Returns `update_at` there; the next call overwrites the result."""

        def run() -> Tensor:
            return cast(Tensor, self.block.update_at(self.x, self.z, self.start, self.size, end, self.cache))

        end = min(math.ceil(end / _SWEEPS) * _SWEEPS, self.x.shape[1])
        self.start.copy_(start)
        self.uses[end] += 1
        if self.uses[end] <= _USES:
            return run()
        if end not in self.graphs:
            replay, g, self.pool = capture(run, self.pool)
            self.graphs[end] = replay, g
        replay, g = self.graphs[end]
        replay()
        return g


def capture(step: Callable[[], T], pool: Any) -> tuple[Callable[[], None], T, Any]:
    """Returns a function that replays `step`, the place of its result, and the memory pool for the next graph."""
    # The step runs once before, on a stream of its own: what libraries set up on first use must not be captured.
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # By default an allocation by any other thread would abort the capture.
    with _capturing, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result, graph.pool()
