"""benchmarks/regimes.py and what pages show of its file: never how long it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import regimes, render
from jacobiflow import native

pytestmark = pytest.mark.usefixtures("one_thread")


def run_of(name: str, megabytes: float, seconds: tuple[float, ...]) -> dict[str, Any]:
    ways = (regimes.PASS, regimes.BF16_PASS, regimes.EXACT_LOOP, regimes.LOOP_IN_PYTORCH)
    timings = {way: {"median": 2 * least, "min": least} for way, least in zip(ways, seconds, strict=True)}
    return {"name": name, "weights_mb": megabytes, "seconds": timings}


@pytest.mark.skipif(native.library() is None, reason="no native loop")
def test_results_in_the_file_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new/regimes.json"
    line = ["--out", str(out), "--shapes", "64x1", "--models", "--rounds", "1", "--batch-sizes"]
    regimes.main([*line, "2"])
    (run,) = json.loads(out.read_text())["runs"]
    # Two norms, four linear layers, the first and the last one, and positions.
    weights = 4 * 64 + (3 + 1 + 4 + 4) * 64**2 + (3 + 1 + 4 + 1) * 64 + (12 + 1) * 64 + (64 + 1) * 24 + 256 * 64
    assert (run["name"], run["batch_size"], run["tokens"]) == ("64x1", 2, 256)
    assert run["weights_mb"] == pytest.approx(4e-6 * weights)
    assert 0 < run["max_difference"] < 1e-4  # of two different loops
    measured = []
    monkeypatch.setattr(regimes, "measure", lambda flow, batch, rounds: measured.append(batch) or run)
    regimes.main([*line, "1", "2"])
    assert measured == [1]
    assert json.loads(out.read_text())["runs"][0] == run


def test_sweeps_win_where_the_faster_loop_takes_more_passes() -> None:
    runs = [run_of("small", 1, (1, 0.5, 2, 8)), run_of("large", 100, (1, 0.5, 8, 6))]
    assert render.sweeps_win(runs, 3) == ["large"]
    assert render.sweeps_win(runs, 7) == []
