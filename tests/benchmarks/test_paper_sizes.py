"""benchmarks/paper_sizes.py, and its estimate: never how long it took."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import jacobiflow as jf
from benchmarks import paper_sizes, render
from benchmarks.paper_sizes import Way

pytestmark = pytest.mark.usefixtures("one_thread")


def preset(strategy: str, tokens: int) -> jf.Preset:
    """Eight blocks."""
    config = jf.TarFlowConfig(1, 2 * int(tokens**0.5), 2, channels=64, num_blocks=8, layers_per_block=1)
    return jf.Preset("", "", config, jf.SamplingSettings(), strategy)


def run_of(tokens: int) -> dict[str, Any]:
    """Seconds of everything, each another one."""
    seconds = {"growing cache": 7.0, "fused loop": 0.5, f"float32 x {tokens}": 40.0, f"bfloat16 x {tokens}": 10.0}
    for size, each in ((1, 2.0), (16, 3.0), (32, 5.0), (64, 8.0), (128, 15.0)):
        seconds |= {f"float32 x {size}": each, f"bfloat16 x {size}": each / 2}
    return {"batch_size": 1, "seconds": {name: {"min": value} for name, value in seconds.items()}}


def block_of(**sweeps: list[int]) -> list[dict[str, Any]]:
    ways = {"window": Way(0, 64), "whole": Way(0, 0), "mixed": Way(3, 0)}
    return [{**ways[name]._asdict(), "sweeps": counts} for name, counts in sweeps.items()]


# A model of 256 tokens with two tough blocks and two others, of two samples each.
SWEEPS = {"models": {"ours": {"tokens": 256, "tough": [1, 3], "blocks": [
    block_of(whole=[4, 6], mixed=[2, 2]), block_of(window=[20, 28], whole=[1, 1], mixed=[2, 2]),
    block_of(whole=[5, 5], mixed=[2, 2]), block_of(window=[30, 32], whole=[1, 1], mixed=[2, 2]),
]}}}  # fmt: skip


def test_results_in_the_file_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, shapes = tmp_path / "new/sizes.json", {"tiny": preset("", 64).config}
    line = ["--out", str(out), "--models", "--rounds", "1", "--batch-sizes"]
    paper_sizes.main([*line, "2"], shapes)
    (run,) = json.loads(out.read_text())["runs"]
    names = {f"{dtype} x {size}" for dtype, size in product(("float32", "bfloat16"), (1, 16, 32, 64))}
    assert set(run["seconds"]) == names | {"growing cache", "fused loop"}
    measured = []
    monkeypatch.setattr(paper_sizes, "measure", lambda config, batch, rounds: measured.append(batch) or run)
    monkeypatch.setattr(paper_sizes, "show", print)
    paper_sizes.main([*line, "1", "2"], shapes)
    assert measured == [1]
    assert json.loads(out.read_text())["runs"][0] == run


def test_sweeps_of_a_bundled_model() -> None:
    """Fewer after sweeps in bfloat16, and about as many as in the result file."""
    flow = jf.TarFlow.from_pretrained("digits-p1").requires_grad_(False)
    tuning = jf.find_tuning(flow)
    assert tuning is not None
    found = paper_sizes.count_sweeps(flow, render.result("digits-p1/report"), jf.Tuning.load(tuning), samples=2)
    written = render.result("paper-sweeps")["models"]["digits-p1"]
    assert (found["tokens"], found["tough"]) == (written["tokens"], written["tough"])
    for tough in (True, False):
        counts, expected = paper_sizes.counted(found, tough), paper_sizes.counted(written, tough)
        assert counts.keys() >= expected.keys()
        for way, blocks in expected.items():
            assert paper_sizes.mean_slowest(counts[way], 1) == pytest.approx(paper_sizes.mean_slowest(blocks, 1), abs=2)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_batch_waits_for_its_slowest_sample(batch: int) -> None:
    counts = (5, 3, 9, 3, 4)
    draws = list(product(counts, repeat=batch))
    assert paper_sizes.slowest_of(counts, batch) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_the_estimate_is_a_sum_over_blocks_of_sweeps_times_seconds() -> None:
    found = paper_sizes.estimates(run_of(256), preset("[0/7-16/8-10/13-6]", 256), SWEEPS)
    # A window sweep takes 8, a pass 40, or 10 in bfloat16; tough blocks take (24 + 31) / 2 sweeps, others 3 + 2 passes.
    tough, others = 27.5 * 8, 3 * 10 + 2 * 40
    assert found == pytest.approx({
        "growing cache": 8 * 256 * 7, "loop in PyTorch": 8 * 256 * 2, "exact loop": 8 * 256 * 0.5,
        "sweeps of ours": 2 * tough + 6 * others + 8 * 40,
        "exact loop or sweeps of ours": 2 * 128 + 6 * 128,
        "`[0/7-16/8-10/13-6]` in float32": 16 * 10 * 3 + 8 * 13 * 5 + 6 * 6 * 40,
        "`[0/7-16/8-10/13-6]` in bfloat16": 16 * 10 * 1.5 + 8 * 13 * 2.5 + 6 * 6 * 10,
    })  # fmt: skip


def test_windows_are_in_proportion_to_the_tokens_and_passes_are_not() -> None:
    found = paper_sizes.estimates(run_of(1024), preset("[7-8-32-10]", 1024), SWEEPS)
    assert found["sweeps of ours"] == pytest.approx(4 * 27.5 * 8 + 7 * 110 + 8 * 40)
    # The loop takes 512 a block: sweeps are cheaper where they take 110 and a certificate, not where 880 and one.
    assert found["exact loop or sweeps of ours"] == pytest.approx(512 + 7 * 150)


def test_the_papers_strategies_say_which_blocks_are_tough() -> None:
    tough = {"img128cond": 1, "img64uncond": 2, "afhq": 1, "img64cond": 2}
    assert {name: paper_sizes.tough_blocks(preset) for name, preset in jf.PRESETS.items()} == tough
