"""Processes: their threads, memory and native code."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
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
