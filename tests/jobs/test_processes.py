"""Processes that share a job, of which some are killed at any moment."""

from __future__ import annotations

import errno
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from jacobiflow.errors import InputValueError
from jacobiflow.jobs import JobStore, run
from jacobiflow.utils.files import FolderInUseError, locked
from tests.helpers.kills import read_files
from tests.helpers.toy_job import Digests, Spec, undisturbed

SPEC = Spec(num=10)
SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 60))]


def start(out: Path, before: Callable[[str], None] = lambda unit: None) -> Any:
    """Starts a process, which adds the units that it begins, and "report", to the file log.txt beside the folder."""

    def log(line: str) -> None:
        with (out.parent / "log.txt").open("a") as file:
            file.write(f"{line}\n")

    def begin(unit: str) -> None:
        log(unit)
        before(unit)

    def work() -> None:
        if run(Digests(SPEC, begin), out).should_print:
            log("report")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def read_log(out: Path) -> list[str]:
    path = out.parent / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def exit_codes(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_loses_no_more_than_a_unit(seed: int, tmp_path: Path) -> None:
    out, draw, num_victims = tmp_path / "out", random.Random(seed), seed % 4
    processes = [start(out, lambda unit: time.sleep(0.02)) for _ in range(3)]
    wait_for((out / "manifest.json").exists)
    for victim in processes[:num_victims]:
        time.sleep(draw.random() * 0.15)
        victim.kill()
    assert exit_codes([*processes[num_victims:], start(out)]) == [0] * (4 - num_victims)
    assert read_files(out) == undisturbed(SPEC)
    units = [line for line in read_log(out) if line != "report"]
    assert {*units} == {path.stem for path in out.glob("units/*")}
    assert len(units) <= len({*units}) + num_victims


def test_others_take_the_unit_of_a_killed_process(tmp_path: Path) -> None:
    """Until then, nobody may replace or extend the job."""
    out = tmp_path / "out"
    victim = start(out, lambda unit: time.sleep(1000 * (unit == "00000")))
    wait_for(lambda: "00000" in read_log(out))
    others = [start(out), start(out)]
    wait_for(lambda: len(list(out.glob("units/*.json"))) == SPEC.num + 1)
    for spec, overwrite in ((Spec(num=11), False), (Spec(seed=1), True)):
        with pytest.raises(FolderInUseError, match="another run is writing to it; wait for it, stop it, or give"):
            run(Digests(spec), out, overwrite=overwrite)
    assert all(process.is_alive() for process in others)
    victim.kill()
    killed = time.monotonic()
    assert exit_codes(others) == [0, 0]
    assert time.monotonic() - killed < 5
    assert read_files(out) == undisturbed(SPEC)
    assert [path.name for path in out.glob(".lock*")] == [".lock"]


def test_processes_begin_at_places_far_apart(tmp_path: Path) -> None:
    barrier = multiprocessing.get_context("fork").Barrier(4)
    first = ["00000", "00002", "00005", "00008"]  # of eleven
    processes = [start(tmp_path / "out", lambda unit: unit in first and barrier.wait(60)) for _ in range(4)]
    assert exit_codes(processes) == [0] * 4
    assert sorted(read_log(tmp_path / "out")[1:5]) == first  # The first line is of the first stage.


def test_one_process_checks_a_finished_unit_while_others_may_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checked, is_intact = tmp_path / "out", tmp_path / "checked.txt", JobStore.is_intact
    run(Digests(SPEC), out)

    def check(store: JobStore, unit: str) -> bool:
        if unit == "salt":  # The first stage, for which all wait.
            wait_for(lambda: len(list(out.glob(".lock-use-*"))) == 3)
        with locked(out, wait=30), checked.open("a") as file:  # Nobody holds the folder's lock for long.
            file.write(f"{unit}\n")
        return is_intact(store, unit)

    monkeypatch.setattr(JobStore, "is_intact", check)
    assert exit_codes([start(out) for _ in range(3)]) == [0] * 3
    assert sorted(checked.read_text().split()) == sorted(path.stem for path in out.glob("units/*"))


@pytest.mark.parametrize("times", [1, 3])
def test_a_unit_that_raises_ends_its_process(times: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The others compute the unit, or meet the error themselves."""
    out = tmp_path / "out"

    def fail(unit: str) -> None:
        if unit == "00003" and read_log(out).count(unit) <= times:
            raise ArithmeticError("no digest")

    assert sorted(exit_codes([start(out, fail) for _ in range(3)])) == [0] * (3 - times) + [1] * times
    assert capfd.readouterr().err.count("ArithmeticError: no digest") == times
    assert (out / "digest.json").exists() == (times < 3)
    run(Digests(SPEC), out)
    assert read_files(out) == undisturbed(SPEC)


def test_a_run_tells_its_progress_and_what_it_has_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    first = run(Digests(Spec(2)), tmp_path, progress=lambda done, total, what: steps.append((done, total, what)))
    assert steps == [(done, total, "digests") for total in (2, 6) for done in range(1, total + 1)]
    assert (first.should_print, first.missing_size) == (True, 6)
    (tmp_path / "digest.json").unlink()
    monkeypatch.setattr(Digests, "machine", {"threads": 2})
    with pytest.warns(UserWarning, match="begun on another machine"):
        again = run(Digests(Spec(2)), tmp_path)
    assert (again.result, again.should_print, again.missing_size) == (first.result, True, 0)
    with pytest.warns(UserWarning, match="begun on another machine"):
        run(Digests(Spec(3)), tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not run(Digests(Spec(3)), tmp_path).should_print


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock by a file that merely exists would outlive a process that is killed."""
    out, message = tmp_path / "out", r"/out: cannot be used as a folder \(no flock on its file system\); give another"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
        run(Digests(SPEC), out)
    monkeypatch.setattr("jacobiflow.jobs.job.find_launch", lambda: Mock(count=2))
    with pytest.raises(InputValueError, match="overwrite=True: several processes"):
        run(Digests(SPEC), out, overwrite=True)
    run(Digests(SPEC), out)
    monkeypatch.setattr(Digests, "version", 2)
    with pytest.raises(InputValueError, match="digests in format 1 of another version of jacobiflow"):
        run(Digests(SPEC), out)
    with pytest.raises(InputValueError, match="holds files that this command did not write"):
        run(Digests(SPEC), tmp_path)
