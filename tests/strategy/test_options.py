"""Ways to solve a block, and the cheapest combination of them: against enumeration and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import invented_block

import jacobiflow as jf
from jacobiflow.calibration.tuning import BlockTuning, Run
from jacobiflow.strategy.costs import Costs
from jacobiflow.strategy.options import Option, PlanSettings, batch_seconds, block_options, cheapest, combined

some = settings(max_examples=50, deadline=None, derandomize=True)
batch_sizes = st.sampled_from([1, 2, 4, 8])
WAY = jf.Solver(jf.Sequential())
# Sixteenths: sums and fourth powers of them are exact.
ways = st.builds(lambda s, e: Option(WAY, s / 16, e / 16), st.integers(0, 64), st.integers(0, 40) | st.just(math.inf))


@given(st.lists(st.lists(ways, min_size=1, max_size=5), min_size=2, max_size=4), st.integers(1, 80))
@some
def test_the_cheapest_is_that_of_an_enumeration(options: list[list[Option]], sixteenths: int) -> None:
    tolerance = sixteenths / 16
    within = [row for row in itertools.product(*options) if sum(one.error**4 for one in row) <= tolerance**4]
    if not within:
        with pytest.raises(ValueError, match=f"tolerance {tolerance}: no way to solve a block is within it"):
            cheapest(options, tolerance)
        return
    chosen = tuple(cheapest(options, tolerance))
    assert chosen in within
    assert sum(one.seconds for one in chosen) == min(sum(one.seconds for one in row) for row in within)


def test_a_tolerance_that_is_just_met_is_met() -> None:
    options = [[Option(WAY, 1.0, 3.0), Option(WAY, 9.0, 0.0)], [Option(WAY, 1.0, 1e-9), Option(WAY, 5.0, 0.0)]]
    assert [option.seconds for option in cheapest(options, 3.0)] == [1, 1]
    assert [option.seconds for option in cheapest(options, 2.99)] == [9, 1]
    assert cheapest([[Option(WAY, 1.0, 1e300), Option(WAY, 1.0, math.nan), *options[0]]], 1.0) == [options[0][1]]


@given(st.lists(st.floats(0, 1e30), max_size=9))
@some
def test_errors_combine_by_the_root_of_the_sum_of_fourth_powers(errors: list[float]) -> None:
    assert combined(errors) == pytest.approx(float((np.array(errors) ** 4).sum() ** 0.25))
    assert combined([*errors, math.inf]) == math.inf


def simulated(sweeps: Sequence[int], batch_size: int, seconds: Callable[[int], float]) -> float:
    """Of a batch, sweep by sweep, with a list of the samples that are still in it; a quarter that is done leaves."""
    ordered = sorted(sweeps)
    left = [ordered[(2 * i + 1) * len(ordered) // (2 * batch_size)] for i in range(batch_size)]
    if batch_size > 1:
        left[-1] = ordered[-1]
    total = 0.0
    while any(count > 0 for count in left):
        total += seconds(len(left))
        left = [count - 1 for count in left]
        running = [count for count in left if count > 0]
        if 4 * (len(left) - len(running)) >= len(left):
            left = running
    return total


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), batch_sizes, st.integers(0, 5), st.integers(0, 5))
@some
def test_a_batch_takes_what_a_simulation_takes(sweeps: list[int], batch_size: int, fixed: int, each: int) -> None:
    total = simulated(sweeps, batch_size, lambda rows: fixed + each * rows)
    assert batch_seconds(sweeps, batch_size, lambda rows: fixed + each * rows) == total


def invented_costs(seed: int, batch_size: int) -> Costs:
    noise = np.random.default_rng(seed)
    rows = sorted({max(batch_size >> k, 1) for k in range(batch_size.bit_length())})
    pairs = itertools.product(rows, (jf.Window(8), jf.Whole()))
    sweep = {(count, partition): 0.01 * (1 + 0.2 * count) * noise.uniform(0.5, 2) for count, partition in pairs}
    fixed = {count: float(noise.uniform(0, 0.02)) for count in rows}
    return Costs(sweep, fixed, *noise.uniform((0.001, 0, 0.02, 0.01, 0), (0.03, 0.02, 0.5, 0.1, 0.2)).tolist())


Way = tuple[str, float, int, int, float, float]  # partition, tolerance, coarse and fine sweeps, seconds, image's error


def expected_ways(block: BlockTuning, costs: Costs, batch_size: int, tolerance: float, margin: float) -> list[Way]:
    """All ways to solve a block that are within the tolerance, by the words of the docstrings."""

    def sweep(partition: jf.Partition) -> Callable[[int], float]:
        timed = {count: seconds for (count, p), seconds in costs.sweep.items() if p == partition}
        return lambda rows: float(np.interp(rows, sorted(timed), [timed[count] for count in sorted(timed)]))

    def start(coarse: int) -> float:
        certified = costs.fixed[batch_size] + costs.certificate
        return certified + (costs.coarse_fixed + coarse * costs.coarse if coarse else 0)

    found: list[Way] = []
    for partition, coarse in {(run.partition, run.coarse) for run in block.runs}:
        alike = (run for run in block.runs if (run.partition, run.coarse) == (partition, coarse))
        runs = sorted(alike, key=lambda run: run.tolerance)
        for tight, loose in itertools.pairwise(runs):
            pairs = zip(sorted(tight.sweeps), sorted(loose.sweeps), strict=True)
            sweeps = tuple(math.ceil((a + b) / 2) for a, b in pairs)
            atol, *rest = (math.sqrt(getattr(tight, n) * getattr(loose, n)) for n in ("tolerance", "residual", "error"))
            runs = [*runs, Run(partition, atol, sweeps, *rest, coarse)]
        for run in runs:
            if run.residual <= tolerance:
                seconds = start(coarse) + simulated(run.sweeps, batch_size, sweep(partition))
                found.append((str(partition), run.tolerance, coarse, 0, seconds, run.error * block.amplification))
    for count in block.counted:
        if margin * count.residual <= tolerance:
            seconds = start(count.coarse) + count.fine * sweep(jf.Whole())(batch_size)
            error = margin * count.error * block.amplification
            found.append((str(jf.Whole()), 0.0, count.coarse, count.fine, seconds, error))
    return sorted(found)


def way_of(option: Option) -> Way:
    solver = option.solver
    atol, fine = solver.stopping.atol or 0.0, solver.stopping.max_sweeps or 0
    return str(solver.partition), atol, solver.coarse, fine, option.seconds, option.error  # type: ignore[return-value]


@given(st.integers(0, 10**6), batch_sizes, st.sampled_from([1e-2, 1e-3, 2e-4]), st.sampled_from([1.0, 1.5, 3.0]))
@some
def test_ways_to_solve_a_block(seed: int, batch_size: int, tolerance: float, margin: float) -> None:
    """Some runs of the invented blocks stopped below the tolerance, and came out above it."""
    block, costs, caution = invented_block(seed), invented_costs(seed, batch_size), PlanSettings(count_margin=margin)
    options = block_options(block, costs, batch_size, tolerance, caution)
    assert {(way.solver.guess, way.solver.correction) for way in options} <= {(block.guess, block.correction)}
    have, want = sorted(map(way_of, options)), expected_ways(block, costs, batch_size, tolerance, margin)
    assert [way[0] for way in have] == [way[0] for way in want]
    assert np.allclose([way[1:] for way in have], [way[1:] for way in want], rtol=1e-9, atol=0)
    uncounted = block_options(block, costs, batch_size, tolerance, caution, counted=False)
    assert uncounted == [option for option in options if option.solver.stopping.atol is not None]
    fine = block_options(block, costs, batch_size, tolerance, replace(caution, low_precision=False))
    assert fine == [option for option in options if option.solver.coarse == 0]
