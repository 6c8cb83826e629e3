"""`auto`: what it plans by, and where its plans are kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import jacobiflow as jf
from jacobiflow.models.memory import memory_needs
from jacobiflow.native import SWITCH
from jacobiflow.planner import Prediction, auto, cache
from tests.helpers.invented import GUIDANCE, small

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Plans:
    """Plans that cost nothing, and the folder in which they are kept."""

    folder: Path
    made: int = 0

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*"))

    def make(self, flow: jf.TarFlow, batch_size: int, tolerance: float, bf16: bool, progress: None) -> Any:
        assert (bf16, progress) == (True, None)
        self.made += 1
        made = Prediction("Abacus", batch_size, flow.guidance, 1.0, 2.0, 0.0)
        return jf.Strategy((jf.Solver(),) * 2, None, max(tolerance, 1e-5), made)


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plans:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(SWITCH, "0")
    plans = Plans(tmp_path / "cache" / "jacobiflow" / "plans")
    monkeypatch.setattr(cache, "make_plan", plans.make)
    monkeypatch.setattr(cache.psutil, "cpu_percent", lambda interval, percpu: [0.0] * 64)
    return plans


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_plan_is_made_once_for_the_next_power_of_two_and_kept(model: Path, plans: Plans) -> None:
    flow = jf.load(model)
    first = auto(flow, 3)
    (file,) = plans.files
    assert jf.Strategy.load(file) == first
    assert auto(flow.guided(jf.Guidance(0.0)), 4, 1e-3) == auto(jf.load(model), 3) == first
    cache._plans.clear()  # as in a new process
    again = auto(jf.load(model), 4)
    assert (again, again.prediction, again.tolerance) == (first, first.prediction, 1e-3)
    assert (plans.made, plans.files) == (1, [file])
    for batch_size, planned in ((1, 1), (5, 8), (8, 8)):
        prediction = auto(flow, batch_size).prediction
        assert prediction is not None
        assert prediction.batch_size == planned
    assert plans.made == len(plans.files) == 3


def test_a_plan_is_made_again_if_its_conditions_change(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, wide = jf.load(model), jf.load(model, dtype="float64")
    auto(flow, 1)
    others: list[Callable[[], Any]] = [
        lambda: auto(flow, 1, 1e-2),
        lambda: auto(flow.guided(GUIDANCE), 1),
        lambda: auto(wide, 1),
        lambda: torch.set_float32_matmul_precision("high"),  # TF32, where there is any
        lambda: torch.set_float32_matmul_precision("highest"),  # as before
        lambda: monkeypatch.setattr(cache, "library_name", lambda: "native-code.so"),
        lambda: monkeypatch.setattr(cache, "registered_pieces", lambda base: {"halves": None}),
    ]
    for other, made in zip(others, (2, 3, 4, 5, 5, 6, 7), strict=True):
        other()
        assert auto(flow, 1) is auto(flow, 1)
        assert plans.made == len(plans.files) == made
    # Conditions that do not change for a flow in a process.
    for name in ("describe_machine", "_code_hash"):
        monkeypatch.setattr(cache, name, lambda *_: "other")
        auto(jf.load(model), 1)
    assert plans.made == len(plans.files) == 9


def test_a_flow_that_trains_leaves_one_file_and_few_plans_in_memory(model: Path, plans: Plans) -> None:
    flow = jf.load(model)
    for step in range(20):
        assert auto(flow, 1) is auto(flow, 1)
        assert (plans.made, len(plans.files)) == (step + 1, 1)
        with torch.no_grad():
            flow.blocks[0].proj_out.bias.add_(0.1)
    assert len(cache._plans[flow.blocks]) == 16


def test_the_newest_plans_are_kept_on_the_disk(model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MAX_FILES", 2)
    kept = list[Path]()
    for batch_size in (1, 2, 4):
        auto(jf.load(model), batch_size)
        (new,) = set(plans.files) - set(kept)
        os.utime(new, (batch_size, batch_size))
        kept.append(new)
    assert plans.files == sorted(kept[1:])


def test_a_damaged_plan_is_made_anew(model: Path, plans: Plans) -> None:
    first = auto(jf.load(model), 1)
    (file,) = plans.files
    file.write_text(file.read_text()[:-9])
    assert auto(jf.load(model), 1) == first == jf.Strategy.load(file)
    assert plans.made == 2


def test_a_plan_of_a_busy_machine_is_used_for_a_minute_and_not_written(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread of two cores leaves one core to other programs. The other cores are not for this process."""
    clock, percents = [0.0], [100.0, 0.0, 80.0, 50.0]
    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(cache.os, "sched_getaffinity", lambda pid: {2, 3}, raising=False)
    monkeypatch.setattr(cache.psutil, "cpu_percent", lambda interval, percpu: percents)
    flow = jf.load(model)
    for clock[0], made in ((0.0, 1), (30.0, 1), (60.0, 1), (60.5, 2), (121.0, 3)):
        auto(flow, 1)
        assert (plans.made, plans.files) == (made, [])
    percents[2] = 70.0
    auto(jf.load(model), 1)
    assert (plans.made, len(plans.files)) == (4, 1)


def test_one_thread_plans_at_a_time(model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would spoil each other's timings; the second takes the plan of the first if it is for the same batch."""
    working, most = list[None](), list[int]()

    def make(*arguments: Any) -> jf.Strategy:
        working.append(None)
        threading.Event().wait(0.05)  # the other threads come here in the meantime, if they may
        most.append(len(working))
        working.pop()
        return cast(jf.Strategy, plans.make(*arguments))

    monkeypatch.setattr(cache, "make_plan", make)
    flow = jf.load(model)
    with ThreadPoolExecutor(4) as pool:
        strategies = list(pool.map(lambda batch_size: auto(flow, batch_size), (1, 1, 8, 8)))
    assert most == [1, 1]
    assert strategies[0] is strategies[1] and strategies[2] is strategies[3]


def test_a_plan_in_memory_is_found_without_reading_or_hashing_anything(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = jf.load(model)
    first = auto(flow, 3)
    for name in ("io.open", "hashlib.sha256", "jacobiflow.models.memory.free_memory"):
        monkeypatch.setattr(name, None)
    assert auto(flow, 3) is first
    with pytest.raises(TypeError, match="NoneType"):
        auto(flow, 4)


def test_no_plan_is_made_for_a_batch_that_does_not_fit_in_memory(
    model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = jf.load(model)
    four = memory_needs(flow).of_batch(4)
    assert four is not None
    for room, planned in ((0.5, 3), (0.99, 3), (1.01, 4)):
        monkeypatch.setattr("jacobiflow.models.memory.free_memory", lambda device, room=room: room * four / 0.8)
        prediction = auto(jf.load(model), 3).prediction
        assert prediction is not None
        assert prediction.batch_size == planned


@pytest.mark.parametrize("place", ["no home", "a file in the way", "home"])
def test_plans_are_in_the_user_s_cache_folder(
    place: str, model: Path, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the home by default; a plan that cannot be kept is used all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "config.json"))
    if place != "a file in the way":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(model))
    if place == "no home":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", lambda uid: {}[uid])
    assert auto(jf.load(model), 1).prediction is not None
    assert (plans.made, plans.files) == (1, [])
    assert len(list(model.glob(".cache/jacobiflow/plans/*.json"))) == (place == "home")


def test_a_tolerance_of_0_is_the_loop(model: Path, plans: Plans) -> None:
    assert auto(jf.load(model), 4, 0) == jf.Strategy.uniform(jf.Solver(jf.Sequential()), 2, 0.0)
    assert plans.made == 0


def test_a_tolerance_that_was_raised_to_the_rounding_is_a_warning_each_time(model: Path, plans: Plans) -> None:
    flow = jf.load(model)
    for call in (auto, lambda flow, num, tolerance: jf.sample(flow, num, tolerance=tolerance)):
        with pytest.warns(UserWarning, match="tolerance 1e-06 is below the rounding") as warned:
            call(flow, 1, 1e-6)
        assert warned[0].filename == __file__
    assert plans.made == 1
