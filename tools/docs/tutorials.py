"""Runs the notebooks of docs/tutorials/ and stores their outputs: `python -m tools.docs.tutorials [NAME ...]`.

Each is executed by a kernel of this Python in an empty folder, and written back whole or not at all. Differences from
run to run without a meaning are left out: warnings, progress bars, colours, versions and execution times of the kernel.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from benchmarks import ROOT
from jacobiflow.utils.files import write_atomically

TUTORIALS = ROOT / "docs" / "tutorials"
# Colours, lines that were written over, progress bars, and the message that native code is compiled.
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n]*\r(?!\n)|^.*━.*\n|^jacobiflow compiles .*\n", re.MULTILINE)
_PYTHON = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path) -> str:
    """Runs a notebook and returns it with its outputs; a cell that fails raises CellExecutionError."""
    notebook: Any = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        # Without a terminal, commands show no progress bars; an empty cache, so that nothing is planned already.
        variables = {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            # Notebooks import `examples`.
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
            "XDG_CACHE_HOME": str(Path(folder) / "cache"),
            "COLUMNS": "110",
            "TTY_COMPATIBLE": "0",
        }
        work = Path(folder) / "work"
        work.mkdir()
        client: Any = NotebookClient(
            notebook, timeout=3600, kernel_name="python3", record_timing=False, coalesce_streams=True,
            resources={"metadata": {"path": work}}, skip_cells_with_tag="install",
        )  # fmt: skip
        client.execute(env=os.environ | variables)
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"
            if cell.cell_type == "code":
                outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
                cell.outputs = [_without_noise(output, str(work)) for output in outputs]
    notebook.metadata = nbformat.from_dict(_PYTHON)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def _without_noise(output: Any, folder: str) -> Any:
    if output.output_type == "stream":
        output.text = _TERMINAL.sub("", output.text.replace("\r\n", "\n")).replace(f"{folder}/", "")
        return output
    output.metadata = {}
    if "image/png" in output.data:
        output.data["text/plain"] = "a picture"
    return output


if __name__ == "__main__":
    for notebook in [TUTORIALS / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(TUTORIALS.glob("*.ipynb")):
        write_atomically(notebook, run(notebook).encode())
        print(f"{notebook.relative_to(ROOT)}: {notebook.stat().st_size / 1000:.0f} kB", flush=True)
