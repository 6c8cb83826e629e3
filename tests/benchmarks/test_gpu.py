"""benchmarks/gpu.py on the fake device: its images and sums, never how long they took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from benchmarks import gpu
from tests.helpers.fake_device import FakeDevice

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

CONFIG = jf.TarFlowConfig(
    1, 8, 1, channels=32, num_blocks=2, layers_per_block=2, num_classes=3, head_dim=16, noise_std=0.1
)
TINY = jf.Preset("tiny", "", CONFIG, jf.SamplingSettings(jf.Guidance(1.5), 1.0), "[1-4-2-3]")
CUDA = torch.device("cuda:0")


def test_images_are_those_of_the_cpu_and_seconds_are_sums_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUNDLED", ("digits-p1",))
    monkeypatch.setattr(gpu, "STRATEGIES", ("sequential", "window:32"))
    with FakeDevice():
        rows = gpu.compare_images(CUDA)["rows"]
        result = gpu.time_model(TINY, 2, "float32", CUDA)
    assert [row["wrong"] for row in rows] == [False] * 4
    assert result["difference_of_loops"] < 1e-4
    block = {name: timing["median"] for name, timing in result["block"].items()}
    assert result["seconds"]["exact loop"] == 2 * block["exact loop"]
    solvers = [value for name, value in block.items() if name.startswith("Solver")]
    assert len(solvers) == 2
    assert result["seconds"]["[1-4-2-3]"] == pytest.approx(sum(solvers))


def test_a_wrong_image_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "compare_images", lambda *_: {"rows": [{"model": "m", "wrong": True}]})
    monkeypatch.setattr(gpu, "time_model", lambda *_: {"seconds": {}})
    monkeypatch.setattr(jf, "PRESETS", {"tiny": TINY})
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), "--device", "cpu"])
    with pytest.raises(SystemExit, match="images that differ from the CPU's"):
        gpu.main()
    assert len(json.loads(out.read_text())["runs"]) == 1 + len(gpu.BATCHES) * len(gpu.DTYPES)
