"""Mutation testing: how many small faults in the code do the tests catch? `python benchmarks/mutants.py`.

A mutant is a copy of the sources with one small fault, made by an operator of cosmic-ray: another operator or
comparison, a number that is one off, a condition turned round, a loop without iterations, and so on. A fixed random
sample of places in each part of the package gets one mutant each, and the tests of that part run on it until one fails.
A mutant that fails a test, does not import or takes too long is killed; one that passes all tests survives. Places
where a fault cannot change what the code computes are left out: annotations, type unions, texts of errors and warnings.

Writes docs/results/mutants.json: the share of killed mutants and the survivors, part by part. It goes on where it was
stopped, unless sources or tests have changed since; about an hour on two cores. Mutants run in forked processes, so it
does not run on Windows.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import venv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults import Mutant, draw

ROOT = Path(__file__).resolve().parent.parent
# Imported once, before the forks. The package itself is not: each mutant imports its own.
HEAVY = (
    "torch", "scipy.stats", "hypothesis", "matplotlib.pyplot", "safetensors.torch", "huggingface_hub", "PIL.Image",
    "sklearn.datasets", "torchmetrics", "zuko", "nflows", "normflows", "sbi.inference", "typer", "rich.progress",
)  # fmt: skip
MEMORY = 8 << 30  # bytes that the tests of a mutant may take: a fault may make an array, or a list, without bound
FAST = 0.1  # seconds of a test; nearly all are below
NOT_RUN = 70  # an exit code that pytest does not use
LEFT_BEHIND = (".git", ".venv", "out", "runs", "build", "dist", "__pycache__", ".*_cache", ".hypothesis")


@dataclass(frozen=True)
class Part:
    """A folder of sources, the files or folders of tests that look after it, and how many mutants to draw."""

    source: str
    tests: tuple[str, ...]
    count: int


PARTS = {
    "solvers": Part("src/jacobiflow/solvers", ("tests/solvers",), 64),
    "strategy": Part("src/jacobiflow/strategy", ("tests/strategy",), 40),
    "adapters": Part("src/jacobiflow/adapters", ("tests/adapters",), 24),
    "storage": Part("src/jacobiflow/storage", ("tests/storage",), 32),
}


@dataclass(eq=False)
class Order:
    """A pytest plugin: sorts tests by file and by what is known of them, and keeps what it sees."""

    first: str  # a word in the names of the files to begin with
    kills: Counter[str] = field(default_factory=Counter)  # mutants that a test has killed so far
    seconds: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failed: list[str] = field(default_factory=list)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tests that killed most mutants, then fast ones; of these those of the file that mirrors the mutated one.

        Tests of a file stay together, for the sake of the fixtures that they share.
        """

        def key(item: pytest.Item) -> tuple[int, bool, bool, str, float]:
            seconds, mirrors = self.seconds.get(item.nodeid, 0.0), self.first in item.path.stem
            return -self.kills[item.nodeid], seconds > FAST, not mirrors, item.path.name, seconds

        items.sort(key=key)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The time of a test's setup, call and teardown, and whether it failed."""
        self.seen[report.nodeid] += report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has failed."""
        if report.failed:
            self.failed.append(report.nodeid)


class Slot:
    """A copy of the tree, and an environment that finds the package there, for one mutant at a time.

    The environment is for the processes that tests start: they run its Python, whatever PYTHONPATH they set.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree, self.folder = folder / "tree", folder
        shutil.copytree(root, self.tree, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        venv.create(folder / "env", symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        (site,) = (folder / "env").glob("lib/python*/site-packages")
        (site / "mutant.pth").write_text(f"{self.tree / 'src'}\n{sysconfig.get_path('purelib')}\n")

    def write(self, file: str, source: str) -> None:
        """Replace a source file; its bytecode goes, which Python may take for current within the second."""
        path = self.tree / file
        path.write_text(source)
        for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            cached.unlink()

    def start(self, arguments: list[str], order: Order, limit: int) -> int:
        """Run pytest in a forked process, whose id is returned; it may take `limit` seconds of CPU time."""
        shutil.rmtree(self.tree / ".hypothesis", ignore_errors=True)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        (self.folder / "seen").write_text(json.dumps({"failed": [], "seconds": {}}))
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = NOT_RUN
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.tree)
            sys.path[:0] = [str(self.tree / "src")]
            os.environ["PYTHONPATH"] = str(self.tree / "src")
            sys.executable = str(self.python)
            multiprocessing.set_executable(sys.executable)
            options = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={self.folder / 'tmp'}"]
            code = int(pytest.main([*options, *arguments], plugins=[order]))
            (self.folder / "seen").write_text(json.dumps({"failed": order.failed, "seconds": order.seen}))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self, pid: int, until: float) -> int | None:
        """The exit code of a run that has ended, negative for a signal; None while it goes on. Stops it at `until`."""
        if time.monotonic() > until:
            os.kill(pid, signal.SIGXCPU)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        with suppress(ProcessLookupError):  # what the tests have started
            os.killpg(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def seen(self) -> dict[str, Any]:
        """What the last run has seen, unless it was stopped: the tests that failed, and the seconds of each."""
        return json.loads((self.folder / "seen").read_text())


def unmutated(slot: Slot, part: Part, limit: int) -> dict[str, Any]:
    """The seconds of the part's tests on the sources as they are, and those that fail even then."""
    pid = slot.start([*part.tests], Order(""), 4 * limit)
    while (code := slot.poll(pid, until=float("inf"))) is None:
        time.sleep(0.1)
    if code not in (0, 1):
        raise SystemExit(f"{part.source}: its tests do not run\n" + (slot.folder / "log").read_text()[-2000:])
    seen = slot.seen()
    return {"fail": seen["failed"], "seconds": {test: round(value, 2) for test, value in seen["seconds"].items()}}


def examine(
    slots: Iterable[Slot], mutants: list[Mutant], part: Part, found: dict[str, Any], limit: int
) -> Iterator[Any]:
    """Yield (mutant, what became of it) for each that `found` does not have yet, as many at once as there are slots."""
    usual, kills = found["unmutated"], Counter(fate["by"] for fate in found["fates"].values())
    waiting = [mutant for mutant in mutants if repr(mutant) not in found["fates"]]
    free = list(slots)
    running: dict[int, tuple[Slot, Mutant, str, float]] = {}
    while waiting or running:
        while waiting and free:
            slot, mutant = free.pop(), waiting.pop(0)
            source = (slot.tree / mutant.file).read_text()
            slot.write(mutant.file, mutant.apply(source))
            leave_out = [word for test in usual["fail"] for word in ("--deselect", test)]
            order = Order(Path(mutant.file).stem, kills, usual["seconds"])
            began = time.monotonic()
            running[slot.start(["-x", *leave_out, *part.tests], order, limit)] = slot, mutant, source, began
        for pid, (slot, mutant, source, began) in list(running.items()):
            code = slot.poll(pid, began + 4 * limit)  # four times: other work may share the cores
            if code is None:
                continue
            if code == NOT_RUN:
                raise SystemExit("the tests could not be started\n" + (slot.folder / "log").read_text()[-2000:])
            by = "timeout" if code == -signal.SIGXCPU else next(iter(slot.seen()["failed"]), f"exit code {code}")
            kills[by] += code != 0
            slot.write(mutant.file, source)
            free.append(slot)
            del running[pid]
            yield mutant, {"killed": code != 0, "by": by if code else "", "seconds": round(time.monotonic() - began, 1)}
        time.sleep(0.02)


def survivor(root: Path, mutant: Mutant) -> dict[str, Any]:
    """A mutant that survived, with the lines that it changes."""
    source = (root / mutant.file).read_text()
    diff = difflib.unified_diff(source.splitlines(), mutant.apply(source).splitlines(), lineterm="", n=0)
    changed = [line for line in diff if line[:3] not in ("---", "+++") and line[:2] != "@@"]
    return {"file": mutant.file, "line": mutant.line, "operator": mutant.operator.partition("/")[2], "diff": changed}


def summary(root: Path, mutants: dict[str, tuple[int, list[Mutant]]], found: dict[str, Any]) -> dict[str, Any]:
    """The share of killed mutants and the survivors, part by part."""
    result = {}
    for name, (count, drawn) in mutants.items():
        fates = [found[name]["fates"][repr(mutant)] for mutant in drawn]
        killed = sum(fate["killed"] for fate in fates)
        result[name] = {
            "places": count,
            "total": len(drawn),
            "killed": killed,
            "timeouts": sum(fate["by"] == "timeout" for fate in fates),
            "share": round(killed / len(drawn), 4),
            "test_seconds": round(sum(found[name]["unmutated"]["seconds"].values()), 1),
            "failing_tests": found[name]["unmutated"]["fail"],
            "survivors": [survivor(root, m) for m, fate in zip(drawn, fates, strict=True) if not fate["killed"]],
        }
    return result


def digest(root: Path, parts: dict[str, Part], seed: int) -> str:
    """Of the sources, the tests and the settings: results of others do not count."""
    files = [path for folder in ("src", "tests") for path in sorted((root / folder).rglob("*.py"))]
    settings = json.dumps([seed, {name: asdict(part) for name, part in parts.items()}])
    return hashlib.sha256(b"".join([settings.encode(), *(path.read_bytes() for path in files)])).hexdigest()


def write(path: Path, value: Any) -> None:
    """JSON, whole or not at all; not by jacobiflow.files, since this process must not import the package."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    """Draw the mutants, run what an earlier run left, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to test")
    parser.add_argument("--table", type=Path, help="JSON of the parts, where the tree has another layout")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "mutants.json")
    parser.add_argument("--progress", type=Path, help="what is done so far; by default in out/")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at once")
    parser.add_argument("--limit", type=int, default=150, help="seconds of CPU time for the tests of a mutant")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    progress = arguments.progress or ROOT / "out" / f"{arguments.out.stem}-progress.json"
    table = json.loads(arguments.table.read_text()) if arguments.table else {}
    parts = {name: Part(row["source"], tuple(row["tests"]), row["count"]) for name, row in table.items()} or PARTS
    mutants = {
        name: draw(root, part.source, part.count, random.Random(f"{arguments.seed} {name}"))
        for name, part in parts.items()
    }

    found: dict[str, Any] = json.loads(progress.read_text()) if progress.exists() else {}
    if found.get("digest") != digest(root, parts, arguments.seed):
        found = {"digest": digest(root, parts, arguments.seed)}
    progress.parent.mkdir(exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        with suppress(ImportError):
            importlib.import_module(name)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    assert "jacobiflow" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        slots = [Slot(root, Path(folder) / str(i)) for i in range(arguments.jobs)]
        for name, part in parts.items():
            if name not in found:
                found[name] = {"unmutated": unmutated(slots[0], part, arguments.limit), "fates": {}}
                write(progress, found)
            for test in found[name]["unmutated"]["fail"]:
                print(f"{name}: left out, since it fails without a mutant: {test}")
            fates = found[name]["fates"]
            for mutant, fate in examine(slots, mutants[name][1], part, found[name], arguments.limit):
                fates[repr(mutant)] = fate
                write(progress, found)
                text = f"killed by {fate['by']}" if fate["killed"] else "SURVIVED"
                place, operator = f"{mutant.file}:{mutant.line}", mutant.operator.partition("/")[2]
                print(f"{name} {len(fates)}/{part.count} {place} {operator} {text} ({fate['seconds']} s)", flush=True)
    result = summary(root, mutants, found)
    write(arguments.out, {"command": "python benchmarks/mutants.py", "seed": arguments.seed, "parts": result})
    for name, row in result.items():
        print(f"{name}: {row['killed']} of {row['total']} mutants killed, {row['share']:.0%}")


if __name__ == "__main__":
    main()
