"""Running what users run: command lines, in this process."""

from __future__ import annotations

import copy
import json
import multiprocessing
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jacobiflow.cli import main


def run_line(line: str, capsys: pytest.CaptureFixture[str]) -> SimpleNamespace:
    """Exit code, stdout and stderr of a command line."""
    return SimpleNamespace(code=main(shlex.split(line)), **capsys.readouterr()._asdict())


def figures(path: str | Path) -> Any:
    """The JSON in a file; NaN and infinity, which are not JSON, fail."""

    def no_json(name: str) -> None:
        raise AssertionError(f"{path}: {name} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=no_json)


def put(value: Any, path: Sequence[Any], new: Any) -> Any:
    """A copy of a JSON value with another entry at `path`."""
    value = copy.deepcopy(value)
    place = value
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = new
    return value


def in_child(work: Callable[[], None]) -> int | None:
    """The exit status of a forked process that does `work`."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    return child.exitcode
