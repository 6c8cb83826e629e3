"""Result files: rows of measurements, each with the commit and a digest of the code that was measured."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.lib.process import threads
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import describe_machine

PACKAGE = ROOT / "src" / "jacobiflow"
# No measured number depends on these parts of the package.
IGNORED = ("cli", "plots")

Json = dict[str, Any]


def parser(description: str | None) -> ArgumentParser:
    """Makes a parser that shows the docstring of a script as its help."""
    return ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)


class ResultFile:
    """A result file that is written after each row, so that a stopped benchmark goes on where it was.

    The file has the command, the machine, and the rows as `runs`. A row is its key, what was measured, the commit,
    and the digest of the code.

    Args:
        path: The file. Its rows are reused if they are of the present code.
        measure: A function of the benchmark, whose module names the command and the code.

    Raises:
        SystemExit: If the file is of another machine: its numbers must not stand beside those of this one.

    Example:
        with ResultFile(RESULTS / "rounding.json", measure) as file:
            for model in MODELS:
                file.row({"model": model}, measure)
    """

    def __init__(self, path: Path, measure: Callable[..., Any]) -> None:
        module = _module_of(measure)
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
        """Returns the row of a key, which is measured and written unless the file has it of the present code."""
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
        """Drops rows whose keys were not asked for, if the benchmark is complete."""
        if error is None:
            self._write(self.rows)

    def _write(self, rows: list[Json]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._head | {"runs": rows})


def complete(name: str, keys: Iterable[Json], measure: Callable[[Json], Json]) -> None:
    """Measures each key of which docs/results/NAME.json has no row of the present code."""
    with ResultFile(RESULTS / f"{name}.json", measure) as file:
        for key in keys:
            file.row(key, measure)


def measure_files(
    description: str | None,
    files: Mapping[str, tuple[Callable[[], Iterable[Json]], Callable[[Json], Json]]],
    one_thread: Sequence[str] = (),
) -> None:
    """Runs the command of a benchmark with several result files: measures the keys of those that are named.

    Args:
        description: Help of the command.
        files: The keys of each result file, and the function that measures them.
        one_thread: Names of the files that are measured with one thread.
    """
    arguments = parser(description)
    arguments.add_argument("files", nargs="+", choices=files, metavar="FILE", help=", ".join(files))
    for name in arguments.parse_args().files:
        keys, measure = files[name]
        with threads(1) if name in one_thread else nullcontext():
            complete(name, keys(), measure)


def _module_of(function: Callable[..., Any]) -> str:
    """The module of a function, by its name even if it runs as a script."""
    function = function.func if isinstance(function, partial) else function
    return str(sys.modules[function.__module__].__spec__.name)  # type: ignore[union-attr]


def find_commit() -> str:
    """The git commit, with "-dirty" if code has changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", "examples")
    return git("rev-parse", "HEAD") + "-dirty" * bool(changed)


@cache
def code_digest(module: str) -> str:
    """Digest of a benchmark, of what the benchmarks share, and of the package; comments and docstrings do not count.

    Args:
        module: Name of the benchmark, such as "benchmarks.masked_flows".
    """
    own = [ROOT / f"{module.replace('.', '/')}.py", *(ROOT / "benchmarks" / "lib").glob("*.py")]
    package = (path for path in PACKAGE.rglob("*") if path.relative_to(PACKAGE).parts[0] not in IGNORED)
    code = [path for path in package if path.suffix in (".py", ".cpp", ".h")]
    return hashlib.sha256("".join(map(_file_digest, sorted(own) + sorted(code))).encode()).hexdigest()[:12]


@cache
def _file_digest(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        text = ast.dump(tree)
    return hashlib.sha256(text.encode()).hexdigest()
