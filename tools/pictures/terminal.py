"""Runs a command and draws what it prints: `python -m tools.pictures.terminal`.

Writes docs/figures/terminal.svg, and terminal-samples.png, the sheet of samples that the command makes.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks import FIGURES
from benchmarks.lib.results import parser

COMMAND = "jacobiflow sample --model fashion-p2 --num 20 --compare"
COLUMNS = 90
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # which a browser would fetch from another host


def main() -> None:
    parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        variables = {"COLUMNS": str(COLUMNS), "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        command = [sys.executable, "-m", "jacobiflow", *shlex.split(COMMAND)[1:], "--out", "samples"]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True
        )
        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        console.print(Text.from_ansi(f"$ {COMMAND}\n{done.stdout}"))
        (FIGURES / "terminal.svg").write_text(FONT.sub("", console.export_svg(title="jacobiflow")))
        shutil.copyfile(Path(folder) / "samples/samples.png", FIGURES / "terminal-samples.png")


if __name__ == "__main__":
    main()
