"""The notebooks of docs/tutorials run on smaller numbers, keep their promises, and print the text stored in them.

Timings are not judged.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

import jacobiflow as jf
from jacobiflow.cli import main
from jacobiflow.models import registry

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
# These replace the numbers in the cell that is tagged "parameters".
SMALL: dict[str, dict[str, Any]] = {
    "molecules": {"num": 10_000},
    "own_images": {"steps": 30, "num": 40},
    "sbi": {"simulations": 250, "checks": 10},
    "tarflow": {"num": 50},
    "zuko": {"steps": 90},
}
# These hold at the end.
PROMISES = {
    "molecules": "share > 0.1 and 3.2 < torch.log((1 - p) / p) < 4.6",
    "own_images": "average[-1] < average[0] and min(loss for _, loss in held_out) > -1.8",
    "sbi": "covered > 0.8 and (samples.mean(0) - truth).abs().max() < 3 * samples.std(0).max()",
    "tarflow": "jf.SampleFolder.open('many').residual().max() <= 1e-3",
    "zuko": "(accelerated - zukos).abs().max() < 1e-2 and (accelerated - truth).abs().mean() < 1e-5",
}

# Commands show warnings as a line.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default::UserWarning:jacobiflow")]


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def shell(line: str) -> None:
    """Runs a line with an exclamation mark, one of our commands, in this process."""
    program, *arguments = shlex.split(line)
    assert program == "jacobiflow"
    assert main(arguments) == 0 or "--check" in arguments


def words(text: str) -> list[str]:
    """The words of printed text, without timings: tables and counts differ with the numbers."""
    return re.findall(r"[A-Za-z_]+", re.sub(".* per loop .*", "", text))


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No window is opened; random numbers, registered flows and other libraries are as before."""
    handles: list[Any] = []

    def accelerate(*arguments: Any) -> Any:
        handles.append(original(*arguments))
        return handles[-1]

    plt.switch_backend("Agg")
    monkeypatch.setattr(registry, "FLOWS", dict(registry.FLOWS))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    original = jf.accelerate
    monkeypatch.setattr(jf, "accelerate", accelerate)
    with torch.random.fork_rng():
        yield
    plt.close("all")
    for handle in handles:
        handle.restore()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: None) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__", "shell": shell}
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000 and text.count('"image/png"') >= 2
    cells = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    assert tagged(cells.pop(0), "install") and len(cells) < 8
    assert sum(tagged(cell, "parameters") for cell in cells) == 1
    for cell in cells:
        assert max(map(len, cell.source.splitlines())) <= 88  # Wider code scrolls in Colab and on the site.
        source = re.sub(r"^!((?:.*\\\n)*.+)$", r'shell(f"""\1""")', cell.source, flags=re.MULTILINE)
        source = re.sub(r"^%timeit (?:-[nr] \d+ )*", "", source, flags=re.MULTILINE)
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(source, path.name, "exec", dont_inherit=True), names)
        if tagged(cell, "parameters"):
            assert SMALL[path.stem].keys() <= names.keys()
            names |= SMALL[path.stem]
        if not ("!jacobiflow" in cell.source or tagged(cell, "machine")):
            stored = "".join(output.text for output in cell.outputs if output.output_type == "stream")
            assert words(output.getvalue()) == words(stored)
    assert eval(PROMISES[path.stem], names)
