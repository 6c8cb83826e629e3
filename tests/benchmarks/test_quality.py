"""Rows of strategy and score: every number once more from the images, and a stopped run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.features import Distance
from benchmarks.lib.peers import GRIDS, PEERS
from benchmarks.quality import ORIGINAL, Experiment, finalists, score_samplers
from jacobiflow.evaluation import FeatureStatistics
from jacobiflow.models.latents import draw_latents
from tests.helpers.problems import make_flow, to_float32
from tests.helpers.scoring import difference, frechet, levels, moments, pixel_figures

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

NUM = 20
GUIDANCE = jf.Guidance(0.6, annealed=False, on="shift", attn_temperature=0.9)
FLOW = to_float32(make_flow(num_classes=3, noise_std=0.1)).guided(GUIDANCE)
REAL = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
SUMS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 100


def project(images: Tensor) -> Tensor:
    """Eight features of 8x8 images: fixed sums of their pixels."""
    return images.flatten(1).float() @ SUMS


def features(pixels: Any) -> Any:
    return pixels.reshape(len(pixels), 64).astype(np.float64) @ SUMS.double().numpy()


def test_rows_are_the_scores_of_their_samples(tmp_path: Path) -> None:
    distance = Distance("projection", project, FeatureStatistics.from_features(project(REAL)))
    experiment = Experiment(FLOW, 0.8, 4, distance)
    names, out = ("jacobi-2", "STARFlow"), tmp_path / "rows.json"
    timings, *scores = score_samplers(experiment, names, NUM, 24, out, {"model": "m"}, repeats=1)
    rows, final = ([row for row in scores if row["part"] == part] for part in ("rows", "final"))
    assert [row["name"] for row in rows] == [ORIGINAL, "sequential", "jacobi-2", "STARFlow"]
    z, labels = draw_latents(NUM, 16, 4, 0), torch.arange(NUM) % 3

    def sample(strategy: str) -> Tensor:
        settings = jf.SamplingSettings(denoise=0.8)
        return jf.sample(
            FLOW, latents=z, labels=labels, settings=settings, strategy=strategy, batch_size=4, certify=False
        ).images

    peer = [PEERS["STARFlow"](FLOW, z[i : i + 4], labels[i : i + 4], **GRIDS["STARFlow"][0]).images
            for i in range(0, NUM, 4)]  # fmt: skip
    exact, star = sample("sequential"), jf.denoise(FLOW, torch.cat(peer), labels, 0.8)
    real = moments(features(REAL.numpy()))
    base = frechet(real, moments(features(levels(exact))))
    for row, images in zip(rows, (exact, exact, sample("jacobi-2"), star), strict=True):
        distance = frechet(real, moments(features(levels(images))))
        assert (row["num"], row["distance"]) == (NUM, pytest.approx(distance, rel=1e-5))
        assert row["relative"] == pytest.approx(distance / base - 1, abs=1e-5)
        assert (row["max"], row["rms"]) == pytest.approx(difference(images, exact), rel=1e-5)
        assert row["pixels"] == pixel_figures(levels(images), levels(exact))
        assert row["seconds"]["median"] == timings["seconds"][row["name"]]["median"] + timings["denoise_seconds"]
        assert row["rate"] == pytest.approx(rows[0]["seconds"]["median"] / row["seconds"]["median"])
    assert rows[2]["max"] > 0.1
    assert [row["name"] for row in final] == finalists(rows)
    assert all(row["num"] == 24 for row in final)
