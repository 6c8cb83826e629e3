"""benchmarks/paper_sizes.py, and the estimate that the page makes of its file: never how long it took."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from running import load_script

import jacobiflow as jf
from jacobiflow import native

pytestmark = pytest.mark.usefixtures("one_thread")

script, page = load_script("paper_sizes"), load_script("paper_sizes_page")
TOUGH, OTHERS = [(20, 28), (30, 32)], [(4, 6), (5, 5)]  # sweeps of two blocks, of two samples each


def preset(strategy: str, tokens: int) -> jf.Preset:
    """Eight blocks."""
    config = jf.TarFlowConfig(1, 2 * int(tokens**0.5), 2, channels=64, num_blocks=8, layers_per_block=1)
    return jf.Preset("", "", config, guidance_weight=0, denoise=0, strategy=strategy)


def made_up(tokens: int) -> dict[str, Any]:
    """Seconds of everything, each another one."""
    seconds = {"growing cache": 7.0, "fused loop": 0.5, f"float32 x {tokens}": 40.0, f"bfloat16 x {tokens}": 10.0}
    for size, each in ((1, 2.0), (16, 3.0), (32, 5.0), (64, 8.0), (128, 15.0)):
        seconds |= {f"float32 x {size}": each, f"bfloat16 x {size}": each / 2}
    return {"batch_size": 1, "seconds": {name: {"min": value} for name, value in seconds.items()}}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a model of 256 tokens."""

    def counted(report: Any, tough: bool) -> dict[Any, Any]:
        ways = {page.Sweeps(0, 64): TOUGH, page.Sweeps(0, 0): [(1, 1)]} if tough else {page.Sweeps(0, 0): OTHERS}
        return ways | {page.Sweeps(3, 0): [(2, 2)]}

    monkeypatch.setattr(page, "counted", counted)
    return type("Report", (), {"num_tokens": 256})


@pytest.mark.skipif(native.library() is None, reason="no native loop")
def test_what_is_written_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, shapes = tmp_path / "made/sizes.json", {"tiny": preset("", 64).config}
    line = ["--out", str(out), "--repeats", "1", "--batch-sizes"]
    script.main([*line, "2"], shapes)
    (run,) = json.loads(out.read_text())["runs"]
    names = {f"{dtype} x {size}" for dtype, size in product(("float32", "bfloat16"), (1, 16, 32, 64))}
    assert set(run["seconds"]) == names | {"growing cache", "fused loop"}
    measured = []
    monkeypatch.setattr(script, "measure", lambda config, batch, repeats: measured.append(batch) or run)
    monkeypatch.setattr(script, "show", print)
    script.main([*line, "1", "2"], shapes)
    assert measured == [1]
    assert json.loads(out.read_text())["runs"][0] == run


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_batch_waits_for_its_slowest_sample(batch: int) -> None:
    counts = (5, 3, 9, 3, 4)
    draws = list(product(counts, repeat=batch))
    assert page.slowest_of(counts, batch) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_sweeps_of_the_bundled_reports_are_of_the_papers_two_kinds_of_blocks() -> None:
    for report in page.reports().values():
        kinds = [page.counted(report, tough) for tough in (True, False)]
        assert sum(len(next(iter(ways.values()))) for ways in kinds) == report.num_blocks
        tough, others = (page.mean_slowest(ways[page.Sweeps(0, 0)], 1) for ways in kinds)
        assert others < tough < report.num_tokens


def test_the_estimate_is_a_sum_over_blocks_of_sweeps_times_seconds(report: Any) -> None:
    found = page.estimates(preset("[0/7-16/8-10/13-6]", 256), made_up(256), {"ours": report})
    seconds = {way: page.total(terms) for way, terms in found.items()}
    # A window sweep takes 8, a pass 40, or 10 in bfloat16; tough blocks take (24 + 31) / 2 sweeps, others 3 + 2 passes.
    tough, others = 27.5 * 8, 3 * 10 + 2 * 40
    assert seconds == pytest.approx({
        "growing cache": 8 * 256 * 7, "loop in PyTorch": 8 * 256 * 2, "fused loop": 8 * 256 * 0.5,
        "sweeps of ours": 2 * tough + 6 * others + 8 * 40,
        "fused loop or sweeps of ours": 2 * 128 + 6 * 128,
        "`[0/7-16/8-10/13-6]` in float32": 16 * 10 * 3 + 8 * 13 * 5 + 6 * 6 * 40,
        "`[0/7-16/8-10/13-6]` in bfloat16": 16 * 10 * 1.5 + 8 * 13 * 2.5 + 6 * 6 * 10,
    })  # fmt: skip


def test_windows_are_in_proportion_to_the_tokens_and_passes_are_not(report: Any) -> None:
    found = page.estimates(preset("[7-8-32-10]", 1024), made_up(1024), {"ours": report})
    assert page.total(found["sweeps of ours"]) == pytest.approx(4 * 27.5 * 8 + 7 * 110 + 8 * 40)
    # The loop takes 512 a block: sweeps are cheaper where they take 110 and a certificate, not where 880 and one.
    assert page.total(found["fused loop or sweeps of ours"]) == pytest.approx(512 + 7 * 150)


def test_the_papers_strategies_say_which_blocks_are_tough() -> None:
    tough = {"img128cond": 1, "img64uncond": 2, "afhq": 1, "img64cond": 2}
    assert {name: page.tough_blocks(preset) for name, preset in jf.PRESETS.items()} == tough
