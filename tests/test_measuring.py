"""Measuring: runs take turns, medians and errors are what they say. No test here asserts how long anything takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

import jacobiflow as jf
from jacobiflow.measuring import Error, Timing, interleave, machine, paired_error


class Clock:
    """A clock that only moves when a run says so; reading it is noted, and so is waiting for the device."""

    def __init__(self) -> None:
        self.now, self.log = 100.0, list[str]()

    def read(self) -> float:
        self.log.append("read")
        return self.now

    def run(self, name: str, durations: list[float]) -> Callable[[], str]:
        """A callable that takes `durations` in turn, and returns its name and how often it has run."""
        left = iter(enumerate(durations))

        def run() -> str:
            count, duration = next(left)
            self.log.append(name)
            self.now += duration
            return f"{name} {count}"

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.log.append(f"wait for {device}"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: clock.log.append("wait for mps"))
    return clock


@pytest.mark.parametrize(("device", "wait"), [("cpu", []), ("cuda:1", ["wait for cuda:1"]), ("mps", ["wait for mps"])])
def test_runs_take_turns_and_the_device_is_waited_for(device: str, wait: list[str], clock: Clock) -> None:
    runs = {"odd": clock.run("odd", [999.0, 5.0, 1.0, 2.0]), "even": clock.run("even", [0.0, 8.0, 8.0, 64.0])}
    timings, results = interleave(
        runs, 3, device, lambda done, total, what: clock.log.append(f"{done} of {total} {what}")
    )
    steps = [(*wait, "read", name, *wait, "read", f"{i} of 8 timing") for i, name in enumerate([*runs] * 4, start=1)]
    assert clock.log == [entry for step in steps for entry in step]
    assert timings == {"odd": Timing(2.0, 1.0, 5.0), "even": Timing(8.0, 8.0, 64.0)}
    assert results == {"odd": "odd 0", "even": "even 0"}  # of the warm-up
    assert interleave({"two": clock.run("two", [999.0, 1.0, 4.0])}, 2)[0] == {"two": Timing(2.5, 1.0, 4.0)}


def test_errors_are_max_mean_and_rms_over_entries() -> None:
    exact = torch.zeros(2, 1, 1, 2)
    assert paired_error(torch.tensor([3.0, -4.0, 0.0, 0.0]).view_as(exact), exact) == Error(4.0, 7 / 4, 2.5)
    many = torch.zeros(1, 1, 2000, 2000)  # summed in float64
    assert paired_error(many + 0.1, many).mean == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
    # NaN in one answer is infinitely far, in both it is no difference.
    whole, lost = torch.ones(1, 1, 1, 3), torch.tensor([1.0, torch.nan, 1.5]).view(1, 1, 1, 3)
    for pair in ((whole, lost), (lost, whole), (torch.full_like(whole, torch.inf), lost)):
        assert paired_error(*pair) == Error(math.inf, math.inf, math.inf)
    assert paired_error(lost, lost) == Error(0.0, 0.0, 0.0)


def test_machine_says_what_a_timing_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    assert list(here) == ["processor", "cores", "threads", "device", "torch", "python", "jacobiflow"]
    assert here["processor"] and here["cores"] >= 1 and here["threads"] == torch.get_num_threads()
    assert (here["device"], here["torch"], here["jacobiflow"]) == ("cpu", torch.__version__, jf.__version__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the name of {device}")
    assert machine("cuda:1")["device"] == "the name of cuda:1"
