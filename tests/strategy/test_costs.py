"""What a machine is measured to take, where the time of every call is known."""

from __future__ import annotations

import copy
import itertools
import math
import time

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import GUIDANCE, TOKENS, Machine, invented_block, make_tuning, small
from problems import MixingBlock, make_flow

import jacobiflow as jf
from jacobiflow.guidance import guided
from jacobiflow.strategy.costs import Costs, ExactCosts, exact_costs, measure

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, WHOLE = jf.Window(8), jf.Whole()
TUNING = make_tuning(invented_block(0), invented_block(1))


@given(st.dictionaries(st.integers(1, 64), st.floats(0.1, 1), min_size=1, max_size=5), st.integers(1, 100))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_seconds_are_linear_between_numbers_of_rows(timed: dict[int, float], rows: int) -> None:
    sweep = {(count, WHOLE): seconds for count, seconds in timed.items()} | {(count, WINDOW): 9.0 for count in timed}
    costs = Costs(sweep, {}, 0, 0, 0, 0, 0)
    want = np.interp(rows, sorted(timed), [timed[count] for count in sorted(timed)])
    assert (costs.of_sweep(rows, WHOLE), costs.of_sweep(rows, WINDOW)) == pytest.approx((float(want), 9))


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
def test_what_a_machine_takes_is_measured(guidance: jf.Guidance | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three sweeps of 16 tokens each passes one more: they read 16, 15 and 14. A window of 8 takes two of 8."""
    machine = Machine(call=1.0, token=0.01, low=0.5, own=0.25)
    flow, twice = machine.carry(small(), monkeypatch), 1 if guidance is None else 2
    block = guided(flow.blocks[0], guidance)
    costs = measure(block, TUNING, 6, flow, exact_costs(block, 6, flow))
    assert set(costs.fixed) == {1, 2, 3, 6}
    assert set(costs.sweep) == {(rows, partition) for rows in costs.fixed for partition in (WINDOW, WHOLE)}
    for rows, fixed in costs.fixed.items():
        whole = machine.seconds(twice * rows, 14.5)
        assert costs.sweep[rows, WHOLE] == pytest.approx(whole)
        assert fixed == pytest.approx(machine.seconds(twice * rows, 16) - whole)
        window = (machine.seconds(twice * rows, 8, 8) - fixed) / 2
        assert costs.sweep[rows, WINDOW] == pytest.approx(window + (0.25 if rows > 1 else 0))
    low = machine.seconds(twice * 6, 13.5) / 2
    assert costs.coarse == pytest.approx(low)
    assert costs.coarse_fixed == pytest.approx(machine.seconds(twice * 6, 16, 15) / 2 - 2 * low)
    assert costs.sequential == pytest.approx(machine.seconds(twice * 6, *[1] * TOKENS))
    assert costs.certificate == pytest.approx(machine.seconds(twice * 6, TOKENS))
    assert costs.spread == 0


def test_the_least_of_a_few_timings_counts_and_the_first_not_for_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(call=0.02, token=2e-4, moods=(1.25, 2.0, 1.0, 1.5))  # a warm-up run is first
    flow = machine.carry(small(), monkeypatch)
    costs = measure(flow.blocks[0], TUNING, 1, flow, exact_costs(flow.blocks[0], 1, flow))
    assert costs.sweep[1, WHOLE] == pytest.approx(machine.seconds(1, 14.5))
    assert (costs.sequential, costs.spread) == pytest.approx((machine.seconds(1, *[1] * TOKENS), 0.25))
    machine = Machine(call=5e-3, low=1.0)
    flow = machine.carry(small(), monkeypatch)
    measure(flow.blocks[0], TUNING, 1, flow, ExactCosts(0, 0, 0))
    assert 0.5 < machine.now < 0.9  # what is short is timed for a tenth of a second, five things here
    machine = Machine(moods=[1 / (1 + n) for n in range(500)], low=1.0)  # ever less busy
    flow = machine.carry(small(), monkeypatch)
    costs = measure(flow.blocks[0], TUNING, 2, flow, ExactCosts(0, 0, 0))
    assert min(*costs.sweep.values(), *costs.fixed.values(), costs.coarse, costs.coarse_fixed) >= 0


def test_what_takes_long_is_timed_twice_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code is compiled in the first run: here a hundred times as long as the others."""
    machine = Machine(call=3.0, moods=(100.0, 1.5, 1.0, 1.0, 1.5))
    flow = machine.carry(small(), monkeypatch)
    assert exact_costs(flow.blocks[0], 2, flow) == pytest.approx((3.0 * TOKENS, 3.0, 0.25))
    assert machine.now == pytest.approx(3.0 * ((100 + 1.5 + 1) * TOKENS + 1 + 1.5))


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def note(event: str) -> float:
        events.append(event)
        return 0.01 * len(events)

    monkeypatch.setattr(time, "perf_counter", lambda: note("clock"))
    for name in ("solve", "certify"):
        monkeypatch.setattr(f"jacobiflow.strategy.costs.{name}", lambda *_, name=name: note(name))
    with FakeDevice():
        flow = copy.deepcopy(small()).to("cuda")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: note("wait"))
        exact_costs(flow.blocks[0], 2, flow)
    for run in ("solve", "certify"):
        assert events.count(run) >= 4
    readings = [i for i, event in enumerate(events) if event == "clock"]
    assert {tuple(events[i - 1 : i + 1]) for i in readings} == {("wait", "clock")}
    assert len(readings) == 2 * (events.count("solve") - 1 + events.count("certify"))


def test_a_block_without_bfloat16_or_fronts_of_its_own_is_measured_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    costs = measure(MixingBlock(TOKENS, 4), TUNING, 2, make_flow(num_classes=3), ExactCosts(0, 0, 0))
    assert (costs.coarse, costs.coarse_fixed) == (math.inf, math.inf)
    assert (set(costs.fixed.values()), set(costs.sweep.values())) == ({3}, {0})  # readings, two of them by the solver
