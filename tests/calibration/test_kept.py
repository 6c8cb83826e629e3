"""A calibration that is interrupted goes on from what it has finished, to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow.calibration import kept
from jacobiflow.files import write_json
from jacobiflow.locking import locked


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


pytestmark = pytest.mark.usefixtures("one_thread")
Problem = tuple[jf.MAF, torch.Tensor]


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    flow = jf.MAF(jf.MAFConfig(1, 3, hidden_features=8, num_blocks=2)).eval()
    return flow, torch.rand(6, 1, 3, 3) * 2 - 1


def calibrate(problem: Problem, out: Path, seed: int = 0) -> bytes:
    flow, images = problem
    jf.calibrate(flow, images, segments=2, traced=3, chord=True, seed=seed, out=out, progress=False)
    return out.read_bytes()


def kill_at_write(number: int, monkeypatch: pytest.MonkeyPatch, problem: Problem, out: Path, seed: int = 0) -> set[str]:
    """The names of what a calibration that is killed at its write of that number has kept."""
    writes = []

    def dying(path: Path, *rest: Any, **settings: Any) -> None:
        writes.append(path)
        if len(writes) == number:
            raise Killed
        write_json(path, *rest, **settings)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(kept, "write_json", dying)
        calibrate(problem, out, seed)
    return {path.name for path in out.with_name("r.json.partial").glob("*")}


def test_killed_at_every_write_it_goes_on_and_ends_with_the_same_bytes(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out = calibrate(problem, tmp_path / "calm.json"), tmp_path / "r.json"
    finished = ["settings.json", "report.json", "block-1.json"]
    for write, count in ((1, 0), (2, 0), (3, 2), (2, 3)):  # the settings alone are not worth keeping
        assert kill_at_write(write, monkeypatch, problem, out) - {".lock"} == set(finished[:count])
    assert not out.exists()
    damaged = tmp_path / "r.json.partial" / "block-1.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert calibrate(problem, out) == expected
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["calm.json", "r.json"]


def test_what_another_calibration_or_somebody_else_has_left_is_not_taken(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out = calibrate(problem, tmp_path / "calm.json"), tmp_path / "r.json"
    kill_at_write(3, monkeypatch, problem, out, seed=1)
    with locked(tmp_path / "r.json.partial"), pytest.raises(ValueError, match="another run is writing"):
        calibrate(problem, out)
    assert calibrate(problem, out) == expected
    theirs = tmp_path / "r.json.partial" / "settings.json"
    theirs.parent.mkdir()
    theirs.write_text("{}")
    with pytest.raises(ValueError, match="was not made by a calibration"):
        calibrate(problem, out)
    assert [entry.name for entry in theirs.parent.iterdir()] == ["settings.json"]
    assert (theirs.read_text(), out.read_bytes()) == ("{}", expected)
