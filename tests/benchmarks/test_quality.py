"""Rows of strategy and score: every number once more from the images, and the file that a run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacobiflow as jf
from benchmarks.peers import GRIDS, PEERS
from benchmarks.quality import ORIGINAL, Experiment, Row, compare, finalists, rows_of
from jacobiflow.evaluation import PixelDifference, Statistics
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing
from tests.helpers.problems import make_flow, to_float32
from tests.helpers.scoring import difference, frechet, levels, moments, pixel_figures

pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.usefixtures("one_thread")

NUM = 20
GUIDANCE = jf.Guidance(0.6, annealed=False, on="shift", attn_temperature=0.9)
FLOW = to_float32(make_flow(num_classes=3, noise_std=0.1)).guided(GUIDANCE)
EXPERIMENT = Experiment(FLOW, denoise=0.8, batch_size=4)


class Projection(nn.Module):
    """Eight features of 8x8 images: fixed sums of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 100)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() @ self.weight


REAL = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def features(pixels: Any) -> Any:
    return pixels.reshape(len(pixels), 64).astype(np.float64) @ Projection().weight.detach().double().numpy()


def run(out: Path, *names: str, final: int | None = None, experiment: Experiment = EXPERIMENT) -> dict[str, Any]:
    statistics = Statistics.of(Projection()(REAL).detach())
    return compare(experiment, names, NUM, final, statistics, Projection(), out, repeats=1, settings={"model": "m"})


def test_rows_are_the_scores_of_their_samples(tmp_path: Path) -> None:
    result = run(tmp_path / "rows.json", "jacobi-2", "STARFlow", final=24)
    rows = rows_of(result)
    assert [row.name for row in rows] == [ORIGINAL, "sequential", "jacobi-2", "STARFlow"]
    z, labels = draw_latents(NUM, 16, 4, 0), torch.arange(NUM) % 3

    def draw(strategy: str) -> Tensor:
        settings: dict[str, Any] = {"denoise": 0.8, "certify": False}
        return jf.sample(FLOW, latents=z, labels=labels, strategy=strategy, batch_size=4, **settings).images

    peer = [PEERS["STARFlow"](FLOW, z[i : i + 4], labels[i : i + 4], **GRIDS["STARFlow"][0]).images
            for i in range(0, NUM, 4)]  # fmt: skip
    images = [draw("sequential"), draw("sequential"), draw("jacobi-2"), jf.denoise(FLOW, torch.cat(peer), labels, 0.8)]
    real, exact = moments(features(REAL.numpy())), images[0]
    base = frechet(real, moments(features(levels(exact))))
    for row, found in zip(rows, images, strict=True):
        distance = frechet(real, moments(features(levels(found))))
        assert (row.num, row.distance) == (NUM, pytest.approx(distance, rel=1e-5))
        assert row.relative == pytest.approx(distance / base - 1, abs=1e-5)
        assert (row.max, row.rms) == pytest.approx(difference(found, exact), rel=1e-5)
        assert vars(row.pixels) == pixel_figures(levels(found), levels(exact))
        seconds, added = result["timings"]["rows"][row.name], result["timings"]["denoise_seconds"]
        assert row.seconds.median == seconds["median"] + added
        assert row.rate == pytest.approx(rows[0].seconds.median / row.seconds.median)
    assert rows[2].max > 0.1
    assert [row["name"] for row in result["final"]] == finalists(rows)
    assert all(row["num"] == 24 for row in result["final"])


def test_a_stopped_run_goes_on_with_the_next_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = run(tmp_path / "whole.json", "jacobi-2", "jacobi-3"), tmp_path / "rows.json"
    draw, count = Experiment.draw, 0

    def stop(self: Experiment, sampler: Any, num: int) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return draw(self, sampler, num)

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out, "jacobi-2", "jacobi-3")
    kept = json.loads(out.read_text())
    assert [row["name"] for row in kept["rows"]] == [ORIGINAL, "sequential", "jacobi-2"]
    result = run(out, "jacobi-2", "jacobi-3")
    assert (result["rows"][:3], result["timings"]) == (kept["rows"], kept["timings"])
    assert [row["max"] for row in result["rows"]] == [row["max"] for row in whole["rows"]]
    with pytest.raises(SystemExit, match="of other settings"):
        run(out, experiment=Experiment(FLOW.guided(None), 0.8, 4))


def test_finalists_are_the_fastest_near_the_original() -> None:
    def row(name: str, relative: float, rate: float) -> Row:
        return Row(name, 2, 1.0, relative, 0.0, 0.0, PixelDifference(0.0, 0), 0.0, Timing(1.0, 1.0, 1.0), rate)

    rows = [row(ORIGINAL, 0, 1), row("sequential", 0, 9), row("jacobi", 0.02, 8), row("[7-8-9-6]", 0.01, 3),
            row("STARFlow", -0.2, 2), row("auto", 0.0, 4), row("auto:1e-1", 0.009, 5)]  # fmt: skip
    assert finalists(rows) == [ORIGINAL, "[7-8-9-6]", "auto:1e-1"]
    assert finalists(rows[:3]) == [ORIGINAL]
