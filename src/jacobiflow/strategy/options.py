"""The ways to solve a block, what they would cost, and the cheapest combination of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from jacobiflow.calibration.tuning import BlockTuning, Run
from jacobiflow.checks import check_count, check_fields, check_number
from jacobiflow.errors import InputValueError
from jacobiflow.solvers import MaxSweeps, Partition, Solver, Tolerance, Whole
from jacobiflow.solvers.loop import LEAVING
from jacobiflow.strategy.costs import Costs


@dataclass(frozen=True)
class PlanSettings:
    """What a plan is cautious about, and what it may use.

    **Attributes:**

    - `margin`: least gain over the sequential loop, as a share: what gains less is left to the loop, which is exact.
    - `least_passes`: the passes that an iteration takes at least, one sweep and the certificate: a loop that takes no
        more is the plan, and nothing is tried.
    - `trials`: how often a choice is tried at most; a trial takes as long as sampling a batch both ways.
    - `stricter`: after a trial whose images were beyond the tolerance, the next choice is for so much of it.
    - `count_margin`: factor on the residuals and errors of counted sweeps, since a count adapts to no sample.
    - `busy`: a plan by timings that differ by more than this share is used, but not kept.
    - `low_precision`: whether sweeps in bfloat16 may come first. `False` is for comparing with samplers that have none.

    **Raises** `TypeError` or `ValueError` where a number is none of at least 0, or `low_precision` is no truth value.
    """

    margin: float = 0.03
    least_passes: float = 2.0
    trials: int = 4
    stricter: float = 0.7
    count_margin: float = 1.5
    busy: float = 0.3
    low_precision: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("trials", self.trials, 0)
        for name in ("margin", "least_passes", "stricter", "count_margin", "busy"):
            check_number(name, getattr(self, name))


_POWER = 4  # see `combined`


class Option(NamedTuple):
    """A way to solve a block: predicted seconds for the batch, certificates included, and the image's error by it."""

    solver: Solver
    seconds: float
    error: float


def block_options(
    block: BlockTuning, costs: Costs, batch_size: int, tolerance: float, settings: PlanSettings, counted: bool = True
) -> list[Option]:
    """Every run of a block's tuning within the tolerance, those between two that were tried included, and its counts.

    Counts of sweeps adapt to no sample: their residuals and errors are given a margin, and without `counted` they are
    left out. So are sweeps in bfloat16 where the settings say so.
    """
    fixed, most_coarse = costs.fixed[batch_size], math.inf if settings.low_precision else 0
    found = []
    for run in _between(block.runs):
        if run.residual <= tolerance and run.coarse <= most_coarse:
            solver = Solver(run.partition, block.guess, Tolerance(run.tolerance), block.correction, run.coarse)
            seconds = batch_seconds(run.sweeps, batch_size, _sweep_seconds(costs, run.partition))
            seconds += fixed + costs.of_coarse(run.coarse) + costs.certificate
            found.append(Option(solver, seconds, run.error * block.amplification))
    for count in block.counted if counted else ():
        if settings.count_margin * count.residual <= tolerance and count.coarse <= most_coarse:
            solver = Solver(Whole(), block.guess, MaxSweeps(count.fine), block.correction, count.coarse)
            seconds = fixed + count.fine * costs.of_sweep(batch_size, Whole()) + costs.of_coarse(count.coarse)
            seconds += costs.certificate
            found.append(Option(solver, seconds, settings.count_margin * count.error * block.amplification))
    return found


def _sweep_seconds(costs: Costs, partition: Partition) -> Callable[[int], float]:
    return lambda rows: costs.of_sweep(rows, partition)


def batch_seconds(sweeps: Sequence[int], batch_size: int, seconds: Callable[[int], float]) -> float:
    """Seconds until a batch is done, of samples whose numbers of sweeps are evenly spaced quantiles of `sweeps`.

    `seconds(rows)` is the cost of a sweep. Finished samples leave when they are a quarter of the batch.
    """
    ordered = sorted(sweeps)
    counts = [ordered[min(int((i + 0.5) / batch_size * len(ordered)), len(ordered) - 1)] for i in range(batch_size)]
    if batch_size > 1:
        counts[-1] = ordered[-1]  # the slowest of a batch is what it waits for
    total, rows = 0.0, batch_size
    for k in range(1, counts[-1] + 1):
        total += seconds(rows)
        left = sum(count > k for count in counts)
        if rows - left >= LEAVING * rows:
            rows = left
    return total


def combined(errors: Sequence[float]) -> float:
    """The largest error of an image from those that its blocks cause: the fourth root of the sum of fourth powers.

    Each is the largest over many entries, and they seldom meet in one: squares would say twice what is measured.
    """
    largest = max(errors, default=0.0)
    if not 0 < largest < math.inf:
        return largest
    return largest * math.pow(sum((error / largest) ** _POWER for error in errors), 1 / _POWER)


def cheapest(options: Sequence[Sequence[Option]], tolerance: float) -> list[Option]:
    """One option per block: the least sum of seconds whose `combined` error is within `tolerance`.

    Exact: blocks are added one by one, and of partial choices only those are kept that no other beats in both seconds
    and error.
    """
    kept: list[tuple[float, float, tuple[Option, ...]]] = [(0.0, 0.0, ())]
    for block in options:
        grown = [
            (seconds + option.seconds, errors + option.error**_POWER, (*path, option))
            for seconds, errors, path in kept
            for option in block
            if option.error <= tolerance and errors + option.error**_POWER <= tolerance**_POWER
        ]
        grown.sort(key=lambda choice: choice[:2])
        kept, least = [], math.inf
        for choice in grown:
            if choice[1] < least:
                kept.append(choice)
                least = choice[1]
    if not kept:
        raise InputValueError(f"tolerance {tolerance}: no way to solve a block is within it")
    return list(kept[0][2])


def _between(runs: Sequence[Run]) -> list[Run]:
    """The runs, and between each two of one partition at neighbouring tolerances their geometric mean."""
    found = list(runs)
    alike: dict[tuple[Partition, int], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.partition, run.coarse), []).append(run)
    for row in alike.values():
        row.sort(key=lambda run: run.tolerance)
        for tight, loose in pairwise(row):
            found.append(
                Run(
                    tight.partition,
                    math.sqrt(tight.tolerance * loose.tolerance),
                    tuple(-(-(a + b) // 2) for a, b in zip(sorted(tight.sweeps), sorted(loose.sweeps), strict=True)),
                    math.sqrt(tight.residual * loose.residual),
                    math.sqrt(tight.error * loose.error),
                    tight.coarse,
                )
            )
    return found
