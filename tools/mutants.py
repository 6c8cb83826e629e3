"""Measures how many small faults the tests catch: `python -m tools.mutants`, about an hour on two cores.

cosmic-ray puts faults into copies of the tree, one at a time, and runs the tests of their part. Writes
out/mutants.json: the share of killed mutants and the diffs of the survivors, part by part. Interrupted, it goes on,
unless sources or tests have changed since.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import resource
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import cosmic_ray.commands
from cosmic_ray.modules import find_modules
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db

from benchmarks import ROOT
from benchmarks.lib.results import Json, parser
from jacobiflow.utils.files import write_json

PARTS = {"fixed_point": 64, "planner": 40, "adapters": 24, "sampling": 32}
"""Number of mutants by the name of the part, a folder of src/jacobiflow and of tests."""
JOBS = 2  # parts tested at once
SECONDS = 600  # for the tests of a mutant, which may never end
MEMORY = 8 << 30  # bytes for them: a fault may make an array, or a list, without bound
UNION = "core/ReplaceBinaryOperator_BitOr_"  # most are in types
IGNORED = (".git", ".venv", "out", "runs", "build", "dist", "__pycache__", ".*_cache", ".hypothesis")


def can_matter(mutation: Any) -> bool:
    """False for a union, a change of a message, and a mutant that is no Python, such as of a signature's star."""
    source = mutation.module_path.read_text()
    raises = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    if mutation.operator_name.startswith(UNION) or any(
        node.lineno <= mutation.start_pos[0] <= node.end_lineno for node in raises
    ):
        return False
    with suppress(SyntaxError):
        mutant = mutate_code(source, get_operator(mutation.operator_name)(), mutation.occurrence)
        return bool(compile(mutant, "mutant", "exec", dont_inherit=True))
    return False


def draw(db: Any, source: Path, count: int) -> None:
    """Fills a database with `count` mutants of the sources in a folder, at different places."""
    cosmic_ray.commands.init(find_modules([source]), db, {})
    places: dict[Any, list[Any]] = defaultdict(list)
    for item in db.work_items:
        (mutation,) = item.mutations
        places[str(mutation.module_path), mutation.start_pos, mutation.operator_name.partition("_")[0]].append(item)
    db.clear()
    rng, drawn = random.Random(0), 0
    for place in rng.sample(sorted(places), len(places)):
        item = rng.choice(sorted(places[place], key=lambda item: item.mutations[0].operator_name))
        if drawn < count and can_matter(item.mutations[0]):
            db.add_work_item(item)
            drawn += 1


def examine(root: Path, name: str, count: int, out: Path) -> Json:
    """Runs the tests of a part on each of its mutants, in a copy of the tree in the folder `out`."""
    tree, session = out / name, out / f"{name}.sqlite"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*IGNORED), dirs_exist_ok=True)
    command = f"cd {shlex.quote(str(tree))} && PYTHONPATH=src OMP_NUM_THREADS=1 {sys.executable} -m pytest -xq"
    command = shlex.join(["sh", "-c", f"{command} -m 'not slow' tests/{name}"])
    with use_db(session) as db:
        if not db.num_work_items:
            draw(db, tree / "src/jacobiflow" / name, count)
        if db.pending_work_items and (failed := mutate_and_test([], command, SECONDS)).is_killed:
            raise SystemExit(f"{failed.output}\n{name}: tests fail without a mutant")
        for item in db.pending_work_items:
            result = mutate_and_test(item.mutations, command, SECONDS)
            db.set_result(item.job_id, result)
            (mutation,) = item.mutations
            print(f"{mutation.module_path.relative_to(tree)}:{mutation.start_pos[0]} {result.test_outcome}", flush=True)
        results = [result for _, result in db.results]
    survivors = sorted(result.diff for result in results if not result.is_killed)
    killed = len(results) - len(survivors)
    return {"total": len(results), "killed": killed, "share": killed / len(results), "survivors": survivors}


def examine_all(root: Path, parts: Mapping[str, int], out: Path) -> dict[str, Json]:
    """Examines parts in a folder of `out` for these sources and tests; returns the result part by part."""
    files = [path for folder in ("src", "tests") for path in sorted((root / folder).rglob("*.py"))]
    digest = hashlib.sha256(json.dumps(parts).encode() + b"".join(path.read_bytes() for path in files)).hexdigest()
    folder = out / "mutants" / digest[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(lambda name: examine(root, name, parts[name], folder), parts)
        return dict(zip(parts, results, strict=True))


if __name__ == "__main__":
    parser(__doc__).parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    parts = examine_all(ROOT, PARTS, ROOT / "out")
    write_json(ROOT / "out/mutants.json", parts)
    for name, row in parts.items():
        print(f"{name}: {row['killed']} of {row['total']} mutants killed, {row['share']:.0%}")
