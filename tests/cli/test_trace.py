"""`jacobiflow trace`: sheets of the library's samples, and their errors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from problems import make_identity
from running import figures

import jacobiflow as jf
from jacobiflow.plots import image_grid

GUIDANCE = jf.Guidance(0.4)
CAPTION = 32
LINE = CAPTION + 8 * 14 + 8  # a caption, then images of 8 pixels, which are drawn as 112


def png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def assert_line(sheet: np.ndarray, i: int, images: torch.Tensor) -> None:
    """Line `i` of a sheet, below the names of its columns, shows `images`."""
    grid = np.asarray(image_grid(images, len(images), 14))
    assert np.array_equal(sheet[i * LINE + 2 * CAPTION : (i + 1) * LINE + CAPTION, : grid.shape[1]], grid)


def assert_traced(
    folder: Path, shown: Any, report: jf.Report, plan: jf.Strategy, num: int, labels: torch.Tensor | None,
    denoise: float, seed: int,
) -> None:  # fmt: skip
    """The sheets show the library's samples, and the figures are their errors."""
    flow = jf.load(f"./{shown['model']}")
    same: dict[str, Any] = {"guidance": report.settings.guidance, "progress": False, "certify": False}
    exact = jf.sample(flow, num, labels, seed, strategy="sequential", denoise=denoise, return_trace=True, **same)
    assert exact.trace is not None
    lines = torch.stack([images[:4] for images in exact.trace], dim=1).flatten(0, 1)
    columns = 1 + report.num_blocks + (denoise > 0)
    assert np.array_equal(png(folder / "sampling.png")[CAPTION:], np.asarray(image_grid(lines, columns, 14)))

    raw, sheet = exact.trace[report.num_blocks], png(folder / "guesses.png")
    assert len(sheet) == CAPTION + LINE * (len(shown["guesses"]) + 1)
    most = max(1, *report.slowest_sweeps("noise", 1e-2))
    least = max(1, most // 3)
    choices = {f"guess by IGM, {plan}": plan}
    for sweeps in (least, max(1, 2 * most // 3), most):
        choices[f"guess by IGM, Jacobi-{sweeps}"] = jf.Strategy.parse(f"jacobi-{sweeps}", report)
    for name, guess in (("0", jf.Zeros()), ("z", jf.Latent())):
        solver = jf.Solver(jf.Whole(), guess, jf.MaxSweeps(least))
        choices[f"guess {name}, Jacobi-{least}"] = jf.Strategy.uniform(solver, report.num_blocks)
    assert {row["name"] for row in shown["guesses"]} == set(choices)
    for i, row in enumerate(shown["guesses"]):
        got = jf.sample(flow, num, labels, seed, strategy=choices[row["name"]], **same).images
        assert row["max_error"] == pytest.approx(float((got - raw).abs().max()))
        assert row["mean_error"] == pytest.approx(float((got - raw).abs().mean()))
        assert f"error max {row['max_error']:.1e}, mean {row['mean_error']:.1e}" in row["caption"]
        assert_line(sheet, i, got)
    assert_line(sheet, len(shown["guesses"]), raw)

    compared = jf.sample(flow, num, labels, seed, strategy=plan, denoise=denoise, **same)
    sheet = png(folder / "comparison.png")
    assert len(sheet) == CAPTION + 3 * LINE
    assert_line(sheet, 0, exact.images)
    assert_line(sheet, 1, compared.images)
    assert (shown["num"], shown["seed"], shown["strategy"]) == (num, seed, str(plan))


def test_it_draws_the_report_and_samples(run: Any, tmp_path: Path) -> None:
    out, report = tmp_path / "new" / "folder", jf.Report.load("report.json")
    result = run(f"trace --model model --report report.json --num 5 --out {out} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    written = [
        "comparison.png",
        "convergence.png",
        "front.gif",
        "front.png",
        "guesses.png",
        "sampling.png",
        "segments.png",
    ]
    assert sorted(os.listdir(out)) == [".lock", *written]
    shown, labels = figures(tmp_path / "f"), torch.tensor([0, 1, 2, 0, 1])
    assert_traced(out, shown, report, jf.Strategy.from_report(report, 1e-2), 5, labels, denoise=1.0, seed=0)
    assert png(out / "convergence.png").shape == png(out / "segments.png").shape == (760, 1660, 3)
    lines = result.out.splitlines()
    assert lines[:-1] == [row["caption"] for row in shown["guesses"]]
    assert all(name in lines[-1] for name in written)
    assert lines[-1].startswith("wrote ") and lines[-1].endswith(f" to {out}")

    guided = replace(report, settings=replace(report.settings, guidance=GUIDANCE), segment_traces={})
    guided.save(tmp_path / "guided.json")
    options = "--num 3 --labels 2 --strategy window:5 --seed 3 --denoise 0.5"
    line = f"trace --model model --report {tmp_path}/guided.json {options} --out {out} --json {tmp_path}/f"
    assert run(line).code == 0
    plan, labels = jf.Strategy.parse("window:5", guided), torch.tensor([2, 2, 2])
    assert_traced(out, figures(tmp_path / "f"), guided, plan, 3, labels, denoise=0.5, seed=3)
    assert "segments.png" not in os.listdir(out), "that of another report"


def test_without_crm_it_compares_jacobi(run: Any, tmp_path: Path) -> None:
    """By the sweeps of the slowest block; at least one, where the guess is the solution as in this identity."""
    flow = make_identity(torch.float32)
    flow.save_pretrained(tmp_path / "identity")
    report = jf.calibrate(flow, torch.zeros(2, 1, 8, 8), segments=2, traced=1, progress=False)
    assert max(report.slowest_sweeps("noise", 1e-2)) == 0
    metrics = {norm: replace(found, components=None) for norm, found in report.metrics.items()}
    replace(report, metrics=metrics, segment_traces={}).save(tmp_path / "r.json")
    line = f"trace --model {tmp_path}/identity --report {tmp_path}/r.json --num 1 --out {tmp_path}/o"
    result = run(f"{line} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    assert figures(tmp_path / "f")["strategy"] == "Jacobi-1"
