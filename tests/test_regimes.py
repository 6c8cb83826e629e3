"""benchmarks/regimes.py and what the page makes of its file: never how long it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import load_script

from jacobiflow import native

pytestmark = pytest.mark.usefixtures("one_thread")

script, page = load_script("regimes"), load_script("regimes_page")


def made_up(name: str, megabytes: float, batch: int, seconds: tuple[float, ...]) -> dict[str, Any]:
    ways = dict(zip((script.PASS, script.LOW, script.FUSED, script.EAGER), seconds, strict=True))
    timings = {way: {"median": 2 * least, "min": least, "max": 3 * least} for way, least in ways.items()}
    shape = {"channels": 64, "layers": 1, "tokens": 4, "values": 1, "weights_mb": megabytes}
    run = {"name": name, "trained": False, "batch_size": batch, "seconds": timings, "max_difference": 1e-6}
    return run | shape


@pytest.mark.skipif(native.library() is None, reason="no native loop")
def test_what_is_written_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "made/regimes.json"
    line = ["--out", str(out), "--shapes", "64x1", "--models", "--repeats", "1", "--batch-sizes"]
    script.main([*line, "2"])
    (run,) = json.loads(out.read_text())["runs"]
    # Two norms, four linear layers, the first and the last one, and positions.
    weights = 4 * 64 + (3 + 1 + 4 + 4) * 64**2 + (3 + 1 + 4 + 1) * 64 + (12 + 1) * 64 + (64 + 1) * 24 + 256 * 64
    assert (run["name"], run["batch_size"], run["tokens"]) == ("64x1", 2, 256)
    assert run["weights_mb"] == pytest.approx(4e-6 * weights)
    assert 0 < run["max_difference"] < 1e-4  # of two different loops
    measured = []
    monkeypatch.setattr(script, "measure", lambda flow, batch, repeats: measured.append(batch) or run)
    script.main([*line, "1", "2"])
    assert measured == [1]
    assert json.loads(out.read_text())["runs"][0] == run


def test_the_page_says_where_sweeps_and_loops_are_best() -> None:
    runs = [made_up("small", 1, 1, (1, 0.5, 2, 8)), made_up("large", 100, 1, (1, 0.5, 8, 6))]
    table = page.regimes({"runs": runs}).splitlines()[2:]
    assert [line.split(" | ")[-2:] for line in table] == [["2.0", "4.0 |"], ["6.0", "12.0 |"]]
    text = page.summary({"runs": runs})
    assert "the fused loop takes 2.0 passes at small, and 8.0 at large" in text
    assert "win at large with 3 evaluations of a token; large with 5 evaluations of a token." in text
    assert "slower than the eager one at large and batch 1." in text
