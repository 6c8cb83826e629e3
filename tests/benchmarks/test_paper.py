"""docs/paper.md names commands that exist; the paper's figures for bundled models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.data import image_grid
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
