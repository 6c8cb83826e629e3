"""benchmarks/paper_shapes.py on a shape for a CPU: what it writes and how it adds up, never how long it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import load_script

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE, SEQUENTIAL
from jacobiflow.experiments.speed import ENCODING_PASS

pytestmark = pytest.mark.usefixtures("one_thread")

script = load_script("paper_shapes")
# T = 16, C = 4; two stacked blocks with different segments, and three others.
CONFIG = jf.TarFlowConfig(1, 8, 2, channels=32, num_blocks=5, layers_per_block=2, num_classes=3, head_dim=16)
TINY = {"tiny": script.Shape(jf.Preset("tiny", "", CONFIG, 1.5, 1.0, "[0/3-4/2-2/3-2]"), paper_rate=2.0)}
LABELS = torch.tensor([0, 2, -1])


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    script.main(["--out", str(out), "--device", "cpu", "--repeats", "1", *arguments], TINY, {})
    return json.loads(out.read_text())["runs"]


def test_what_is_written_adds_up_and_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = run(tmp_path / "made/results.json", "--shapes", "tiny", "--batch-sizes", "2")
    parts, rows = found["parts"], {row["method"]: row for row in found["rows"]}
    paper = "GS-Jacobi [0/3-4/2-2/3-2]"
    assert [*rows] == [GROWING_CACHE, SEQUENTIAL, paper, "window", "window, bfloat16 first", ENCODING_PASS]
    assert rows[paper]["parts"] == {"Segments(count=4) x 2": 1, "Segments(count=2) x 3": 1, "Whole() x 2": 3}
    windows = {"Window(size=4) x 2": 1, "Window(size=8) x 3": 1, "Whole() x 2": 3, "certificate": 5}
    assert rows["window"]["parts"] == windows
    for row in rows.values():
        seconds = sum(count * parts[name]["seconds"]["median"] for name, count in row["parts"].items())
        assert row["seconds"] == pytest.approx(seconds)
        assert row["rate"] == pytest.approx(5 * parts[GROWING_CACHE]["seconds"]["median"] / seconds)
    assert found["differences"][GROWING_CACHE] < 1e-5
    assert parts["Whole() x 2"]["evaluations_per_token"] == (16 + 15) / 16  # the first token is done
    measured = []
    monkeypatch.setattr(script, "measure", lambda shape, batch, *_: measured.append(batch) or {"rows": []})
    again = run(tmp_path / "made/results.json", "--shapes", "tiny", "--batch-sizes", "1", "2")
    assert measured == [1]
    assert again[0] == found


@pytest.mark.parametrize("shape", script.SHAPES.values())
def test_windows_evaluate_tokens_as_often_as_the_papers_segments(shape: Any) -> None:
    length = shape.preset.config.num_tokens
    assert sum(shape.solvers.values()) == shape.preset.config.num_blocks == 8
    for solver in shape.solvers:
        window = script.matched(solver, length)
        assert 0 <= script.evaluations(window, length) - script.evaluations(solver, length) <= length
        if isinstance(solver.partition, jf.Segments):
            assert window.partition == jf.Window(length // solver.partition.count)
