"""How far a run is, as it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sample_folders import manifest_of, record_of, run

import jacobiflow as jf
from jacobiflow.storage.progress import run_progress


@pytest.fixture
def folder(tmp_path: Path) -> jf.SampleFolder:
    return jf.SampleFolder(tmp_path, manifest_of(1400, shard_size=500))


def finish(folder: jf.SampleFolder, index: int) -> None:
    """As any process finishes a shard; a quarter of its samples were solved again."""
    start, stop = folder.manifest.spans()[index]
    record = record_of(start, stop - start, labels=None, certificate=None, resolved=tuple(range(0, stop - start, 4)))
    folder.write(index, torch.zeros(record.num, 1, 4, 4, dtype=torch.uint8), record)


def test_lines_count_the_samples_of_all_processes(folder: jf.SampleFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with run_progress(folder, [0, 2], every=0) as update:
        for samples, done in ((250.7, None), (500, 0), (399, None), (400, 2), (400, 1)):
            if done is not None:
                finish(folder, done)
            update(samples)
    pattern = r"^([\d,]+) of 900 samples, [\d.]+ a second, (none finished yet|[\d.]+% re-solved)$"
    found = re.findall(pattern, capsys.readouterr().err, re.MULTILINE)
    assert [count for count, _ in found] == ["250", "900", "899", "900", "900"]  # never more than there are
    assert [share for _, share in found] == ["none finished yet", *["25.00% re-solved"] * 4]


def test_a_line_every_half_minute_with_the_rate_so_far(
    folder: jf.SampleFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with run_progress(folder, [0, 1, 2]) as update:
        for seconds in (20, 30, 30.5, 60, 60.5, 61):
            now[0] = 100 + seconds
            update(20 * seconds)
    lines = re.findall(r"([\d,]+) of 1,400 samples, ([\d.]+) a second", capsys.readouterr().err)
    assert lines == [("610", "20.0"), ("1,220", "20.0")]


def test_a_bar_on_a_terminal(
    folder: jf.SampleFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with run_progress(folder, [0], every=0) as update:
        update(125)
    assert re.search(r"\x1b\[.*125 of 500 samples", capsys.readouterr().err, re.DOTALL)


def test_nothing_is_shown_unasked(folder: jf.SampleFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for shown, todo in ((False, [0]), (True, [])):
        with run_progress(folder, todo, shown, every=0) as update:
            update(5)
    run(folder.path / "short", progress=True)
    assert capsys.readouterr() == ("", "")
