"""Measures what it costs to share a job: `python -m benchmarks.claiming`.

10,000 units, which take next to no time themselves, are shared by 16 processes through a folder. The time of a unit is
therefore that of claiming it, writing its file and record, and looking at it again. The first row is of `BEFORE`, the
last commit at which processes walked the units in the same order and locked each before they looked at it. Writes
docs/results/claiming.json, which fills docs/clusters.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import ROOT
from benchmarks.lib import tiny_job
from benchmarks.lib.results import Json, measure_files

BEFORE, NOW = "87567c76", "working tree"
NUM_UNITS, NUM_PROCESSES = 10_000, 16


def measure(key: Json) -> Json:
    """Seconds for a new folder, and for a finished one, whose files are hashed again."""
    with TemporaryDirectory() as folder:
        package = ROOT / "src" if key["package"] == NOW else checkout(key["package"], Path(folder))
        arguments = [f"{folder}/job", str(key["units"]), str(key["processes"])]
        environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", tiny_job.__name__, *arguments]
        output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    return {"seconds": json.loads(output)}


def checkout(commit: str, folder: Path) -> Path:
    """Writes the package of a commit into a folder."""
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder)
    return folder / "src"


def main() -> None:
    keys = [{"package": package, "units": NUM_UNITS, "processes": NUM_PROCESSES} for package in (BEFORE, NOW)]
    measure_files(__doc__, {"claiming": [(keys, measure)]})


if __name__ == "__main__":
    main()
