"""benchmarks/gpu.py on the fake device: what it finds and keeps, never how long it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from benchmarks import gpu
from tests.helpers.fake_device import FakeDevice

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = jf.TarFlowConfig(
    1, 8, 1, channels=32, num_blocks=2, layers_per_block=2, num_classes=3, head_dim=16, noise_std=0.1
)
TINY = jf.Preset("tiny", "", CONFIG, jf.SamplingSettings(jf.Guidance(1.5), 1.0), "[1-4-2-3]")
CUDA = torch.device("cuda:0")


def test_images_are_those_of_the_cpu() -> None:
    with FakeDevice():
        rows = gpu.images(CUDA, ("digits-p1",), ("sequential", "window:32"))["rows"]
    assert not any(row["wrong"] for row in rows)
    assert {(row["strategy"], row["guided"]) for row in rows} == {
        (strategy, guided) for strategy in ("sequential", "window:32") for guided in (False, True)
    }


def test_seconds_of_a_model_are_sums_over_its_blocks() -> None:
    with FakeDevice():
        found = gpu.shape(TINY, 2, "float32", CUDA)
    assert found["difference_of_loops"] < 1e-4
    block = {name: timing["median"] for name, timing in found["block"].items()}
    assert found["seconds"]["exact loop"] == 2 * block["exact loop"]
    parts = [value for name, value in block.items() if name.startswith("Solver")]
    assert len(parts) == 2
    assert found["seconds"]["[1-4-2-3]"] == pytest.approx(sum(parts))


def test_a_wrong_image_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "images", lambda *_: {"rows": [{"model": "m", "wrong": True}]})
    monkeypatch.setattr(gpu, "shape", lambda *_: {"seconds": {}})
    for _ in range(2):
        with pytest.raises(SystemExit, match="images that differ from the CPU's"):
            gpu.main(["--out", str(out), "--device", "cpu"], {"tiny": TINY})
        assert len(json.loads(out.read_text())["runs"]) == 1 + len(gpu.BATCHES) * len(gpu.DTYPES)
