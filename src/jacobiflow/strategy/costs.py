"""What solving a block costs on a device, measured by real solves."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacobiflow.calibration.tuning import Tuning
from jacobiflow.flows.base import AffineBlock, FrontPerSample, LowPrecision
from jacobiflow.flows.image_flow import ImageFlow, state_dtype
from jacobiflow.measuring import synchronize
from jacobiflow.solvers import (
    MaxSweeps,
    Partition,
    Plain,
    Sequential,
    SlidingRun,
    Solution,
    Solver,
    Tolerance,
    Whole,
    certify,
    no_gradients,
    solve,
)

REPEATS = 3  # timings of one thing, whose least or median counts
_LEAST_SECONDS = 0.1  # of repeating what is short, in which the loop's own work is as large as differences are
MOST_SECONDS = 2.0  # of repeating what is long
_SETTLED = 1e30  # a tolerance that every sweep meets


@dataclass(frozen=True)
class Costs:
    """Seconds on a device.

    **Attributes:** `sweep[rows, partition]`, for one sweep of so many samples over a run of the partition;
    `fixed[rows]`, for starting a block; `coarse`, for one sweep of the whole batch over all tokens in bfloat16, and
    `coarse_fixed`, for starting these; `sequential`, for a block solved token by token by the whole batch;
    `certificate`, for the pass that measures the batch's residuals; `spread`, how far repeated timings differ, as a
    share.
    """

    sweep: Mapping[tuple[int, Partition], float]
    fixed: Mapping[int, float]
    coarse: float
    coarse_fixed: float
    sequential: float
    certificate: float
    spread: float

    def of_sweep(self, rows: int, partition: Partition) -> float:
        """Seconds of a sweep, linear between the numbers of rows that were timed."""
        timed = sorted(r for r, p in self.sweep if p == partition)
        if rows <= timed[0]:
            return self.sweep[timed[0], partition]
        high = next((r for r in timed if r >= rows), timed[-1])
        low = max((r for r in timed if r < high), default=high)
        if high == low:
            return self.sweep[high, partition]
        share = (min(rows, high) - low) / (high - low)
        return (1 - share) * self.sweep[low, partition] + share * self.sweep[high, partition]

    def of_coarse(self, count: int) -> float:
        """Seconds of `count` sweeps in bfloat16, with what starting them takes."""
        return self.coarse_fixed + count * self.coarse if count else 0.0


class ExactCosts(NamedTuple):
    """Seconds of a block solved token by token, and of the pass that measures its residuals; `spread` as in `Costs`."""

    sequential: float
    certificate: float
    spread: float


def measure(
    block: AffineBlock, tuning: Tuning, batch_size: int, flow: ImageFlow, exact: ExactCosts,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Costs:  # fmt: skip
    """Measure the seconds that a plan is made of, on the block's device. It takes a second or two.

    `exact` are those of `exact_costs`; `track` goes through the numbers of rows, and may show how far it has come.

    A sweep over a run is timed as a solve whose every sweep meets its tolerance: contexts of all lengths, and the
    loop's own work, are in the mean.
    """
    clock = _Clock(block, tuning, batch_size, flow)
    partitions = {run.partition: None for tuned in tuning.blocks for run in tuned.runs}
    sweep: dict[tuple[int, Partition], float] = {}
    fixed: dict[int, float] = {}
    counts = sorted({1, *(-(-batch_size // part) for part in (1, 2, 4, 8))}, reverse=True)
    for rows in track(counts):  # the longest first: a guess at the time left is then not too low
        one, three = (clock.seconds(Whole(), rows, sweeps=k) for k in (1, 3))
        sweep[rows, Whole()] = max((three - one) / 2, 0.0)
        fixed[rows] = max(one - sweep[rows, Whole()], 0.0)
        for partition in partitions:
            if partition.stop(0, tuning.num_tokens) == tuning.num_tokens:
                sweep[rows, partition] = sweep[rows, Whole()]
                continue
            passes = _runs(partition, tuning.num_tokens)
            shared = max((clock.seconds(partition, rows) - fixed[rows]) / passes, 0.0)
            sweep[rows, partition] = shared + clock.own_fronts(partition, rows)
    coarse = coarse_fixed = math.inf
    if isinstance(block, LowPrecision):
        two, four = (clock.seconds(Whole(), batch_size, sweeps=1, coarse=k) for k in (2, 4))
        coarse = max((four - two) / 2, 0.0)
        coarse_fixed = max(two - 2 * coarse - fixed[batch_size] - sweep[batch_size, Whole()], 0.0)
    spread = statistics.median([*clock.spreads, exact.spread])
    return Costs(sweep, fixed, coarse, coarse_fixed, exact.sequential, exact.certificate, spread)


def exact_costs(block: AffineBlock, batch_size: int, flow: ImageFlow) -> ExactCosts:
    """Measure what the whole batch takes in a block. A sample goes first, by which native code is compiled."""
    z, labels = _zeros(batch_size, flow)

    def loop(rows: int) -> Solution:
        return solve(block, z[:rows], Solver(Sequential()), None if labels is None else labels[:rows])

    loop(1)
    sequential = timings(lambda: loop(batch_size), z.device)
    certificate = timings(lambda: certify(block, z, z, labels), z.device)
    spread = statistics.median(map(_spread, (sequential, certificate)))
    return ExactCosts(min(sequential), min(certificate), spread)


def timings(run: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of two runs or more: the more, the shorter they are. Work that is queued on the device is waited for."""
    seconds: list[float] = []
    while (
        len(seconds) < 2 or (len(seconds) <= REPEATS and sum(seconds) < MOST_SECONDS) or sum(seconds) < _LEAST_SECONDS
    ):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _spread(seconds: Sequence[float]) -> float:
    """By how much the median is above the least, as a share. The first of three or more, a warm-up, does not count."""
    counted = seconds[1:] if len(seconds) > 2 else seconds
    return statistics.median(counted) / min(counted) - 1


def _zeros(batch_size: int, flow: ImageFlow) -> tuple[Tensor, Tensor | None]:
    """Latents for timings, and labels where the flow has classes."""
    config, device = flow.config, flow.var.device
    z = torch.zeros((batch_size, config.num_tokens, config.token_channels), dtype=state_dtype(flow), device=device)
    return z, torch.zeros(batch_size, dtype=torch.long, device=device) if config.num_classes else None


def _runs(partition: Partition, num_tokens: int) -> int:
    """The number of runs from the first token to the last, where the front passes all tokens of a run."""
    count = front = 0
    while front < num_tokens:
        front = partition.stop(front, num_tokens)
        count += 1
    return count


@dataclass
class _Clock:
    """Times solves of one block from zeros; `spreads` collects how far repeated timings differ."""

    block: Any
    tuning: Tuning
    batch_size: int
    flow: ImageFlow
    spreads: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.z, self.labels = _zeros(self.batch_size, self.flow)
        corrections = (tuned.correction for tuned in self.tuning.blocks)
        self.correction = next((c for c in corrections if c != Plain()), Plain())

    def seconds(self, partition: Partition, rows: int, sweeps: int | None = None, coarse: int = 0) -> float:
        """The least of a few solves of so many rows, `sweeps` of each token; `None` is one sweep of each run."""
        stopping = Tolerance(_SETTLED) if sweeps is None else MaxSweeps(sweeps)
        solver = Solver(partition, self.tuning.blocks[0].guess, stopping, self.correction, coarse)
        seconds = timings(lambda: solve(self.block, self.z[:rows], solver, self._labels(rows)), self.z.device)
        self.spreads.append(_spread(seconds))
        return min(seconds)

    def own_fronts(self, partition: Partition, rows: int) -> float:
        """Extra seconds of a sweep whose samples each start at a token of their own."""
        if rows == 1 or not isinstance(self.block, FrontPerSample) or not isinstance(partition, SlidingRun):
            return 0.0
        block: Any = self.block
        z, size = self.z[:rows], partition.stop(0, self.tuning.num_tokens)
        start = (z.shape[1] - size) // 2
        starts = torch.full((rows,), start, device=z.device)
        cache = block.init_cache(z, self._labels(rows))
        shared: list[float] = []
        own: list[float] = []
        with no_gradients(block):
            for _ in range(2 * REPEATS):
                for seconds, call in (
                    (shared, lambda: block.update(z, z, start, start + size, cache)),
                    (own, lambda: block.update_at(z, z, starts, size, start + size, cache)),
                ):
                    began = time.perf_counter()
                    call().sum().item()  # waits for the device
                    seconds.append(time.perf_counter() - began)
        return max(statistics.median(own) - statistics.median(shared), 0.0)

    def _labels(self, rows: int) -> Tensor | None:
        return None if self.labels is None else self.labels[:rows]
