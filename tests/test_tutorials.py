"""The notebooks of docs/tutorials run, on smaller numbers, and print what they say. Timings are not judged.

They run in this process: what a notebook promises it asserts itself.
"""

from __future__ import annotations

import io
import json
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

from jacobiflow.cli.app import main
from jacobiflow.flows import registry

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
# In place of the numbers in the cell that is tagged "parameters".
SMALL: dict[str, dict[str, Any]] = {
    "converge": {"drawn": 2, "samples": 8},
    "own_flow": {"steps": 40, "num": 20},
    "sbi": {"simulations": 250, "checks": 10},
    "tarflow": {"num": 1024, "calibration": "--num 16 --traced 2"},
    "zuko": {"steps": 90},
}

# Commands show warnings as a line.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default::UserWarning:jacobiflow")]


def notebook(name: str) -> Any:
    return nbformat.read(TUTORIALS / f"{name}.ipynb", 4)


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def shell(line: str) -> None:
    """What a line with an exclamation mark runs; a command of ours, here in this process."""
    program, *arguments = shlex.split(line)
    assert program == "jacobiflow"
    with pytest.raises(SystemExit) as stop:
        main(arguments)
        raise SystemExit(0)
    assert stop.value.code in (0, None) or "--check" in arguments


def as_python(source: str) -> str:
    return re.sub(r"^!(.+)$", r'shell(f"""\1""")', source, flags=re.MULTILINE)


def without_numbers(text: str) -> str:
    """The words of what was printed: tables and counts differ with the numbers."""
    return " ".join(re.sub(r"[^A-Za-z_]+", " ", text).split())


def printed(cell: Any) -> str:
    """What the cell printed when the committed notebook was made."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No window is opened, and random numbers and registered flows are as before."""
    plt.switch_backend("Agg")
    monkeypatch.setattr(registry, "FLOWS", dict(registry.FLOWS))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with torch.random.fork_rng():
        yield
    plt.close("all")


def test_every_tutorial_runs() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_promises(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_its_own: None) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"__name__": "__main__", "shell": shell}
    cells = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert sum(tagged(cell, "parameters") for cell in cells) == 1
    for cell in cells:
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(as_python(cell.source), f"{name}.ipynb", "exec", dont_inherit=True), found)
        if tagged(cell, "parameters"):
            assert SMALL[name].keys() <= found.keys()
            found |= SMALL[name]
        if not ("!jacobiflow" in cell.source or tagged(cell, "machine")):
            assert without_numbers(output.getvalue()) == without_numbers(printed(cell))


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_committed_and_small(name: str) -> None:
    found = notebook(name)
    nbformat.validate(found)
    text = (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 400_000
    outputs = [output for cell in found.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any(tagged(cell, "machine") and "cores of" in printed(cell) for cell in found.cells if "outputs" in cell)
    assert "/home/" not in text and "/tmp/" not in text
    assert json.loads(text)["metadata"]["language_info"] == {"name": "python"}
