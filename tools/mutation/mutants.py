"""Measures how many small faults the tests catch: `python -m tools.mutation.mutants`, about an hour on two cores.

For each fault of tools/mutation/faults.py the tests of its part run in a copy of the tree until one fails. Writes
out/mutants.json: the share of killed mutants and the survivors, part by part.
Interrupted, it goes on, unless sources or tests have changed since.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks.lib.results import Json, parser
from jacobiflow.utils.files import write_json
from tools.mutation.faults import Mutant, draw

SEED = 0
JOBS = 2  # mutants tested at once
SECONDS = 600  # for the tests of a mutant, which may never end
MEMORY = 8 << 30  # bytes for them: a fault may make an array, or a list, without bound
IGNORED = (".git", ".venv", "out", "runs", "build", "dist", "__pycache__", ".*_cache", ".hypothesis")


class Part(NamedTuple):
    """A folder of sources, the folder of its tests, and the number of mutants to draw."""

    source: str
    tests: str
    mutants: int


PARTS = {
    "fixed_point": Part("src/jacobiflow/fixed_point", "tests/fixed_point", 64),
    "planner": Part("src/jacobiflow/planner", "tests/planner", 40),
    "adapters": Part("src/jacobiflow/adapters", "tests/adapters", 24),
    "sampling": Part("src/jacobiflow/sampling", "tests/sampling", 32),
}


def first_failure(tree: Path, tests: str) -> str:
    """The first test of a tree that fails, "timeout", or an empty string if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", tests]
    environment = {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=os.environ | environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "timeout"
    if process.returncode == 0:
        return ""
    failure = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return failure[1] if failure else f"exit code {process.returncode}"


def killer(trees: queue.Queue[Path], mutant: Mutant, tests: str) -> str:
    """The test that a mutant fails, in the next tree that is free; an empty string if it survives."""
    tree = trees.get()
    path = tree / mutant.file
    source = path.read_text()
    try:
        path.write_text(mutant.apply(source))
        return first_failure(tree, tests)
    finally:
        path.write_text(source)
        trees.put(tree)


def survivor(root: Path, mutant: Mutant) -> Json:
    """A mutant that survived, with the lines that it changes."""
    source = (root / mutant.file).read_text()
    diff = difflib.unified_diff(source.splitlines(), mutant.apply(source).splitlines(), lineterm="", n=0)
    lines = [line for line in diff if line[:3] not in ("---", "+++") and line[:2] != "@@"]
    return {"file": mutant.file, "line": mutant.line, "operator": mutant.operator.partition("/")[2], "diff": lines}


def digest(root: Path, parts: Mapping[str, Part]) -> str:
    """A hash of sources, tests and settings; results of others do not count."""
    files = [path for folder in ("src", "tests") for path in sorted((root / folder).rglob("*.py"))]
    settings = json.dumps([SEED, parts])
    return hashlib.sha256(b"".join([settings.encode(), *(path.read_bytes() for path in files)])).hexdigest()


def examine(root: Path, parts: Mapping[str, Part], progress: Path) -> Json:
    """Runs the tests of all mutants that the file `progress` lacks; returns the result part by part."""
    state: Json = {"digest": digest(root, parts), "killed_by": {}}
    if progress.exists() and (previous := json.loads(progress.read_text()))["digest"] == state["digest"]:
        state = previous
    progress.parent.mkdir(parents=True, exist_ok=True)
    result: Json = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(JOBS):
            trees.put(shutil.copytree(root, Path(folder) / str(i), ignore=shutil.ignore_patterns(*IGNORED)))
        for name, part in parts.items():
            places, mutants = draw(root, part.source, part.mutants, random.Random(f"{SEED} {name}"))
            new = [mutant for mutant in mutants if repr(mutant) not in state["killed_by"]]
            if new and (failure := first_failure(trees.queue[0], part.tests)):
                raise SystemExit(f"{failure} fails without a mutant")
            killers = pool.map(lambda mutant: killer(trees, mutant, part.tests), new)  # noqa: B023
            for mutant, test in zip(new, killers, strict=True):
                state["killed_by"][repr(mutant)] = test
                write_json(progress, state)
                print(f"{name} {mutant.file}:{mutant.line} {test or 'SURVIVED'}", flush=True)
            survivors = [mutant for mutant in mutants if not state["killed_by"][repr(mutant)]]
            killed = len(mutants) - len(survivors)
            result[name] = {
                "places": places, "total": len(mutants), "killed": killed, "share": round(killed / len(mutants), 4),
                "survivors": [survivor(root, mutant) for mutant in survivors],
            }  # fmt: skip
    return result


def main() -> None:
    parser(__doc__).parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    parts = examine(ROOT, PARTS, ROOT / "out" / "mutants-progress.json")
    write_json(ROOT / "out" / "mutants.json", {"seed": SEED, "parts": parts})
    for name, row in parts.items():
        print(f"{name}: {row['killed']} of {row['total']} mutants killed, {row['share']:.0%}")


if __name__ == "__main__":
    main()
