"""docs/paper.md names commands that exist; the paper's figures, settings and sizes for bundled models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from benchmarks import strategies
from jacobiflow.data import image_grid
from tests.helpers.invented import make_report
from tools.docs import render
from tools.pictures.paper_figures import draw_figures

ROOT = Path(__file__).resolve().parents[2]
CAPTION = 40  # pixels

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_table_and_figure_has_a_command() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = re.findall(r"^\| (Table|Figure)s? (.*?) \|(.*)\|$", text, re.MULTILINE)
    numbers = {(kind, number) for kind, name, _ in rows for number in re.findall(r"\d", name)}
    assert numbers == {("Table", str(i)) for i in range(1, 10)} | {("Figure", str(i)) for i in range(1, 8)}
    for _, name, cells in rows:
        (commands,) = [cell for cell in cells.split(" | ") if re.match(r"\s*`(jacobiflow|python|make) ", cell)]
        for module in re.findall(r"`python -m ([\w.]+)", commands):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), name


@pytest.mark.slow
def test_figures_of_a_bundled_model_show_its_samples(tmp_path: Path) -> None:
    flow, report = jf.load("digits-p1"), render.result("digits-p1/report")
    draw_figures(flow, report, tmp_path, "digits", "[2/3-4-8-7]")
    names = ("comparison", "convergence", "guesses", "sampling", "segments")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"digits-{name}.png" for name in names]

    labels = torch.arange(10)
    exact = jf.sample(
        flow,
        10,
        labels,
        strategy="sequential",
        settings=jf.SamplingSettings(denoise=1.0),
        certify=False,
        return_intermediates=True,
    )
    assert exact.intermediates is not None
    lines = torch.stack([images[:4] for images in exact.intermediates], dim=1).flatten(0, 1)
    with Image.open(tmp_path / "digits-sampling.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels[CAPTION:], np.asarray(image_grid(lines, 1 + report.num_blocks + 1, 14)))


AFHQ = (51.85, 51.45, 66.76, 64.98, 73.77, 84.05, 76.64, 348.51)  # CRM, Table 2 of the paper
IMG64COND = (141.22, 9.25, 1.36, 1.82, 7.68, 5.08, 3.08, 19.81)
TABLE_4A = "7-1024-1-6 7-1-256-6 7-2-128-6 7-4-64-6 7-8-32-6 7-16-16-6"  # with 6 sweeps elsewhere, in place of 10
TABLE_4B = """
    0/7-256-1-6 0/7-256/1-1/64-6 0/7-256/2-1/32-6 0/7-256/4-1/16-6 0/7-256/8-1/8-6 0/7-256/4-1/24-6
    0/7-256/8-1/12-6 0/7-16/8-8/12-6 0/7-16/8-10/12-6 0/7-16/8-12/12-6
"""  # with 12, which is 3 T / 8 over 8, in place of 13


@pytest.mark.parametrize(("crm", "tokens", "published"), [(AFHQ, 1024, TABLE_4A), (IMG64COND, 256, TABLE_4B)])
def test_the_grid_has_the_papers_settings(crm: tuple[float, ...], tokens: int, published: str) -> None:
    report = make_report(crm, num_tokens=tokens)  # 6 sweeps in blocks that are not tough
    grid = strategies.grid(report)
    plans = [jf.Strategy.parse(name, report) for name in grid]
    for text in ("Jacobi-30", "Jacobi-60", *(f"[{text}]" for text in published.split())):
        assert jf.Strategy.parse(text, report) in plans
    assert len(set(grid)) == len(grid)
