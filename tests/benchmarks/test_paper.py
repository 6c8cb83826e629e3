"""docs/paper.md names commands that exist, and its figures are drawn for a bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from benchmarks.paper_figures import choices, draw_figures
from jacobiflow.plots import image_grid

ROOT = Path(__file__).resolve().parents[2]
CAPTION = 32  # pixels
LINE = CAPTION + 8 * 14 + 8  # a caption, then images of 8 pixels, drawn as 112

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_table_and_figure_has_a_command() -> None:
    rows = re.findall(
        r"^\| ((?:Tables?|Figures?) .*?) \|(.*)\|$", (ROOT / "docs" / "paper.md").read_text(), re.MULTILINE
    )
    numbers = {(name[:5], number) for name, _ in rows for number in re.findall(r"\d", name)}
    assert numbers == {("Table", str(i)) for i in range(1, 10)} | {("Figur", str(i)) for i in range(1, 8)}
    for name, cells in rows:
        (commands,) = [cell for cell in cells.split(" | ") if re.match(r"\s*`(jacobiflow|python|make) ", cell)]
        for module in re.findall(r"`python -m ([\w.]+)", commands):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), name


def png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_figures_of_a_bundled_model(tmp_path: Path) -> None:
    """The sheets show the library's samples."""
    flow = jf.load("digits-p1")
    path = jf.find_report(flow)
    assert path is not None
    report = jf.Report.load(path)
    draw_figures(flow, report, tmp_path, "digits", "[2/3-4-8-7]")
    names = ("comparison", "convergence", "guesses", "sampling", "segments")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"digits-{name}.png" for name in names]

    labels = torch.arange(10)
    exact = jf.sample(flow, 10, labels, strategy="sequential", denoise=1.0, certify=False, return_trace=True)
    assert exact.trace is not None
    lines = torch.stack([images[:4] for images in exact.trace], dim=1).flatten(0, 1)
    grid = np.asarray(image_grid(lines, 1 + report.num_blocks + 1, 14))
    assert np.array_equal(png(tmp_path / "digits-sampling.png")[CAPTION:], grid)

    sheet, strategies = png(tmp_path / "digits-guesses.png"), choices(report, "[2/3-4-8-7]")
    assert len(sheet) == CAPTION + LINE * (len(strategies) + 1)
    for i, strategy in enumerate(strategies.values()):
        images = jf.sample(flow, 10, labels, strategy=strategy, certify=False).images
        grid = np.asarray(image_grid(images, 10, 14))
        assert np.array_equal(sheet[i * LINE + 2 * CAPTION : (i + 1) * LINE + CAPTION, : grid.shape[1]], grid)
