"""docs/paper.md names commands that exist; the paper's figures for bundled models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jacobiflow as jf
from tools.docs import render
from tools.pictures.paper_figures import draw_figures

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_table_has_a_command_and_every_figure_a_row() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = re.findall(r"^\| (Table|Figure)s? (.*?) \|(.*)\|$", text, re.MULTILINE)
    numbers = {(kind, number) for kind, name, _ in rows for number in re.findall(r"\d", name)}
    assert numbers == {("Table", str(i)) for i in range(1, 10)} | {("Figure", str(i)) for i in range(1, 8)}
    for kind, name, cells in rows:
        assert kind == "Figure" or re.search(r"\| `(jacobiflow|python|make) ", cells), name
    for module in re.findall(r"`python -m ([\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.slow
def test_figures_of_a_bundled_model_are_drawn(tmp_path: Path) -> None:
    flow, report = jf.load("digits-p1"), render.result("digits-p1/report")
    draw_figures(flow, report, tmp_path, "digits", "[2/3-4-8-7]")
    names = ("comparison", "convergence", "guesses", "sampling", "segments")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"digits-{name}.png" for name in names]
