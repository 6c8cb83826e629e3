"""How far a run is, as it is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_folders import manifest_of, record_of, run

import jacobiflow as jf
from jacobiflow.storage.progress import run_progress


def folder_of(path: Path) -> jf.SampleFolder:
    return jf.SampleFolder(path, manifest_of(1400, shard_size=500))


def finish(folder: jf.SampleFolder, index: int) -> None:
    """As any process finishes a shard; a quarter of its samples were solved again."""
    start, stop = folder.manifest.spans()[index]
    num = stop - start
    record = record_of(start, num, labels=None, certificate=None, resolved=tuple(range(0, num, 4)))
    folder.write(index, torch.zeros(num, 1, 4, 4, dtype=torch.uint8), record)


def test_lines_count_the_samples_of_all_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, lines = folder_of(tmp_path), []
    with run_progress(folder, [0, 2], every=0) as update:
        for share, done in ((250.7, None), (500, 0), (399, None), (400, 2), (400, 1)):
            if done is not None:
                finish(folder, done)
            update(share)
            lines += capsys.readouterr().err.splitlines()
    pattern = r"([\d,]+) of 900 samples, ([\d.]+) a second, (none finished yet|[\d.]+% re-solved)"
    found = [match.groups() for match in map(re.compile(pattern).fullmatch, lines) if match is not None]
    assert [count for count, _, _ in found] == ["250", "900", "899", "900", "900"]  # never more than there are
    assert [share for _, _, share in found] == ["none finished yet", *["25.00% re-solved"] * 4]
    assert all(float(rate) > 0 for _, rate, _ in found)


def test_a_rate_is_of_the_time_since_the_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with run_progress(folder_of(tmp_path), [0, 1, 2]) as update:
        for seconds in (20, 30, 30.5, 60, 60.5, 61):
            now[0] = 100 + seconds
            update(10 * seconds)
    rates = re.findall(r"(\d+) of 1,400 samples, ([\d.]+) a second", capsys.readouterr().err)
    assert rates == [("305", "10.0"), ("610", "10.0")]  # a line where more than 30 seconds have passed


def test_a_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with run_progress(folder_of(tmp_path), [0], every=0) as update:
        update(125)
    shown = capsys.readouterr().err
    assert "125 of 500 samples" in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize("shown, todo", [(False, [0]), (True, [])])
def test_nothing_is_shown_unasked(shown: bool, todo: list[int], tmp_path: Path, capsys: Any) -> None:
    with run_progress(folder_of(tmp_path), todo, shown, every=0) as update:
        update(5)
    assert capsys.readouterr() == ("", "")


def test_a_short_run_without_a_terminal_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run(tmp_path, progress=True)
        assert capsys.readouterr() == ("", "")
