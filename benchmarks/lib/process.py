"""Processes: their threads, memory and native code, and commands in other processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from jacobiflow.native import SWITCH


@contextmanager
def without_native() -> Iterator[None]:
    """Runs exact loops in PyTorch until the block ends; also decorates a function."""
    with patch.dict(os.environ, {SWITCH: "0"}):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch uses so many threads until the block ends; also decorates a function."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start_command(line: str, out: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Starts a command of jacobiflow that writes to the folder `out`, with one thread, as from a terminal."""
    command = [sys.executable, "-m", *launcher, "jacobiflow", *line.split(), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Waits for processes. Raises AssertionError with their error output if one of them fails."""
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), errors


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, whose memory has held nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def memory(name: str) -> int:
    """Bytes of this process: all in memory ("VmRSS"), without pages of files ("RssAnon"), or at most ("VmHWM")."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def reset_peak_memory() -> None:
    """Sets the peak, `memory("VmHWM")`, to what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
