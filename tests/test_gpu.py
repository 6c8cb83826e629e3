"""benchmarks/gpu.py on the fake device: what it finds and keeps, never how long it took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from running import load_script

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

shapes, script, page, planning = map(load_script, ("paper_shapes", "gpu", "gpu_page", "planning_at_size"))
CONFIG = jf.TarFlowConfig(
    1, 8, 1, channels=32, num_blocks=2, layers_per_block=2, num_classes=3, head_dim=16, noise_std=0.1
)
TINY = shapes.Shape(jf.Preset("tiny", "", CONFIG, 1.5, 1.0, "[1-4-2-3]"), paper_rate=2.0)
CUDA = torch.device("cuda:0")


def test_its_parts_on_the_fake_device() -> None:
    with FakeDevice():
        found = script.images(CUDA, ("digits-p1",), ("sequential", "window:32", "gs-jacobi:8-12"))
        assert not found["wrong"]
        assert {row["strategy"] for row in found["rows"]} == {"sequential", "window:32", "gs-jacobi:8-12"}
        peaks = script.memory(CUDA, TINY, 4)
        assert 0 < peaks["a batch"] <= peaks["three batches, in the slots of one"] <= 1.3 * peaks["a batch"]
        assert 0 < peaks["certificates of a batch"] < peaks["a batch"]
        measured = script.shape_part(TINY, 2, torch.float32, CUDA)
    assert measured["differences"].keys() == {shapes.GROWING_CACHE, shapes.GRAPHS}
    assert {row["method"] for row in measured["rows"]} > {shapes.GRAPHS, "window"}
    row = {"precision": "tf32", "tolerance": 2e-2, "network_calls": 1234, "certificate": 1e-2, "seconds": 0.5}
    precise = {"rows": [row | {"resolved_sequentially": 0}]}
    parts = {"images": found, "precision": precise, "memory": peaks, "tiny, batch 2, float32": measured}
    shown = page.measured({"machine": script.machine_of(torch.device("cpu")), "parts": parts})
    for words in ("| digits-p1 | yes | window:32 |", "| tf32 | 2.0e-02 | 1,234 |", "target 4.0x", shapes.GRAPHS):
        assert words in shown


def test_a_clock_at_size_counts_passes() -> None:
    """A pass of the small model is one of the large one; a step of one token takes the reading of all weights."""
    small, large = jf.load("digits-p1"), jf.TarFlow(replace(CONFIG, channels=128))
    clock, x = planning.AtSize(small, large), torch.zeros(3, 64, 1)
    with clock, torch.inference_mode():
        small.blocks[0].affine_whole(x)
    assert clock.passes == pytest.approx(3, rel=0.1)  # attention on a CPU is not counted
    assert clock.now == pytest.approx(3 * planning.flops(large) / planning.RATE, rel=0.1)
    before = clock.now
    with clock, torch.inference_mode():
        small.blocks[0].proj_in(x[:1, :1])
    share = small.blocks[0].proj_in.weight.nbytes / sum(p.nbytes for p in small.blocks[0].parameters())
    read = sum(p.nbytes for p in large.blocks[0].parameters()) / planning.BANDWIDTH
    assert clock.now - before == pytest.approx(share * read)  # as many steps in both


def test_it_goes_on_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def part(name: str, **found: Any) -> Any:
        return lambda device: asked.append(name) or found

    out, parts = tmp_path / "gpu.json", {"a": part("a", x=1), "images": part("images", wrong=[{"model": "m"}])}
    script.main(["--out", str(out), "--device", "cpu", "--minutes", "0"], {"a": parts["a"]})
    assert asked == []
    assert "a: left out, 0 minutes are over" in capsys.readouterr().out
    script.main(["--out", str(out), "--device", "cpu"], {"a": parts["a"]})
    with pytest.raises(SystemExit, match="images that differ from the CPU's"):
        script.main(["--out", str(out), "--device", "cpu"], parts)
    assert asked == ["a", "images"]
    assert json.loads(out.read_text())["parts"]["a"] == {"x": 1}
