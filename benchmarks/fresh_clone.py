"""What a newcomer waits for: `python benchmarks/fresh_clone.py` clones HEAD, and times the README's two commands there.

Writes docs/results/fresh-clone.json. The clone has no environment, and the user's cache folder is empty: packages are
fetched, native loops compiled and plans made.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

from jacobiflow.measuring import machine

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("make demo", "make test")


def main() -> None:
    """Time the commands, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        clone, cache = Path(folder, "jacobiflow"), Path(folder, "cache")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["XDG_CACHE_HOME"] = str(cache)
        seconds = {}
        for command in COMMANDS:
            started = perf_counter()
            subprocess.run(command.split(), cwd=clone, env=environment, check=True)
            seconds[command] = perf_counter() - started
    result = {"command": "python benchmarks/fresh_clone.py", "machine": machine(), "seconds": seconds}
    (ROOT / "docs" / "results" / "fresh-clone.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
