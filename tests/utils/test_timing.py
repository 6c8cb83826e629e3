"""Runs take turns, and the device's queued work is timed. No test here asserts how long anything takes."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch

from jacobiflow.utils.timing import Timing, time_interleaved


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_runs_take_turns_and_the_device_is_waited_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now, queued, log = [100.0], [1e6], list[Any]()  # `queued`: seconds of work on the device
    durations = {"odd": iter([999.0, 5.0, 1.0, 2.0, 4.0]), "even": iter([0.0, 8.0, 8.0, 64.0])}

    def wait(name: torch.device | str) -> None:
        assert str(name) == device
        now[0], queued[0] = now[0] + queued[0], 0.0

    def run(name: str) -> str:
        queued[0] += next(durations[name])
        log.append(name)
        return f"{name} {len(log)}"

    def progress(*step: Any) -> None:
        queued[0] = 1e6
        log.append(step)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.mps, "synchronize", partial(wait, "mps"))
    timings, results = time_interleaved({name: partial(run, name) for name in durations}, 3, device, progress)
    order = ["odd", "even", "even", "odd"] * 2  # each round starts with the next
    assert log == [entry for i, name in enumerate(order, start=1) for entry in (name, (i, 8, "timing"))]
    assert timings == {"odd": Timing(2.0, 1.0, 5.0), "even": Timing(8.0, 8.0, 64.0)}
    assert results == {"odd": "odd 1", "even": "even 3"}  # of the warm-up
    assert time_interleaved({"odd": partial(run, "odd")}, 1, device, warm_up=False)[0]["odd"].median == 4
