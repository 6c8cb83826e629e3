"""Result files: rows of measurements, each with the commit and a digest of what was measured."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.lib.imports import imported_files
from benchmarks.lib.process import threads
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import describe_machine

# Weights, data and C++ sources, which any benchmark may read, as git's path patterns.
DATA = ("benchmarks/weights", "examples", "src/jacobiflow", ":!*.py", ":!*.md")

Json = dict[str, Any]


def parser(description: str | None) -> ArgumentParser:
    """Makes a parser that shows the docstring of a script as its help."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


class ResultFile:
    """A result file that is written after each row, so that a stopped benchmark goes on where it was.

    The file has the command, the machine, and the rows as `runs`. A row is its key, what was measured, the commit,
    and the digest of the code and the weights.

    Args:
        path: The file. Its rows are reused if they have the present digest.
        measure: A function of the benchmark, whose module names the command and the code.

    Raises:
        SystemExit: If the file is of another machine: its numbers must not stand beside those of this one.

    Example:
        with ResultFile(RESULTS / "rounding.json", measure) as file:
            for model in MODELS:
                file.row({"model": model}, measure)
    """

    def __init__(self, path: Path, measure: Callable[..., Any]) -> None:
        module = str(sys.modules[measure.__module__].__spec__.name)  # type: ignore[union-attr]
        self.path, self.rows = path, list[Json]()
        self._head = {"command": f"python -m {module}", "machine": describe_machine()}
        self._code = {"commit": find_commit(), "code": code_digest(module)}
        old: Json = json.loads(path.read_text()) if path.exists() else self._head
        if old["machine"] != self._head["machine"]:
            raise SystemExit(
                f"{path} is of {old['machine']}, and this machine is {self._head['machine']}: remove the file to "
                "measure all of it"
            )
        self._old: list[Json] = old.get("runs", [])

    def __enter__(self) -> ResultFile:
        return self

    def row(self, key: Json, measure: Callable[[Json], Json]) -> Json:
        """Returns the row of a key, which is measured and written unless the file has it with the present digest."""
        row = next((row for row in self._old if key.items() <= row.items()), None)
        if row is not None:
            self._old.remove(row)
        if row is None or row.get("code") != self._code["code"]:
            print(f"{self.path.name}: {key}", flush=True)
            row = key | measure(key) | self._code
        self.rows.append(row)
        self._write(self.rows + self._old)
        return row

    def __exit__(self, error: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Drops rows whose keys the benchmark no longer has, if it is complete."""
        if error is None:
            self._write(self.rows)

    def _write(self, rows: list[Json]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._head | {"runs": rows})


def measure_files(
    description: str | None,
    files: Mapping[str, Sequence[tuple[Iterable[Json], Callable[[Json], Json]]]],
    one_thread: Sequence[str] = (),
) -> None:
    """Runs the command of a benchmark: measures the keys of its result files, or of those that the command names.

    Args:
        description: Help of the command.
        files: The parts of each file of docs/results, by its name without ending: keys, and the function that measures
            the row of a key. All keys of a file are listed before the first is measured.
        one_thread: Names of the files that are measured with one thread.
    """
    arguments = parser(description)
    arguments.add_argument("files", nargs="*", default="all", choices=[*files, "all"], metavar="FILE")
    named = arguments.parse_args().files
    keep_freed_memory()
    for name in files if "all" in named else named:
        rows = [(key, measure) for keys, measure in files[name] for key in keys]
        path = RESULTS / f"{name}.json"
        with threads(1) if name in one_thread else nullcontext(), ResultFile(path, rows[0][1]) as file:
            for key, measure in rows:
                file.row(key, measure)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def find_commit() -> str:
    """The git commit, with "-dirty" if code has changed since."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks", "examples")
    return _git("rev-parse", "HEAD") + "-dirty" * bool(changed)


@cache
def code_digest(module: str) -> str:
    """Digest of a benchmark, the modules that it imports, and data; comments and docstrings do not count.

    Args:
        module: Name of the benchmark, such as "benchmarks.masked_flows".
    """
    names = _git("ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", *DATA)
    files = sorted(imported_files(module, ROOT)) + [ROOT / name for name in names.splitlines()]
    return hashlib.sha256("".join(map(_file_digest, files)).encode()).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".py":
        tree = ast.parse(content)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        content = ast.dump(tree).encode()
    return hashlib.sha256(content).hexdigest()
