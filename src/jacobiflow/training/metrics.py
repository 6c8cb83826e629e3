"""The figures of every step, a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepReport:
    """One optimiser step, counted from 1.

    `bits_per_dim` is of the noisy (or dequantised) training batch, under a standard normal prior. `grad_norm` is before
    clipping. `seconds` are those of training so far, over all runs.
    """

    step: int
    loss: float
    bits_per_dim: float
    grad_norm: float
    rate: float
    seconds: float

    def line(self) -> str:
        """The line of `metrics.jsonl`."""
        return json.dumps({name: round(x, 6) for name, x in asdict(self).items()}) + "\n"


_NAMES = [field.name for field in fields(StepReport)]
_START = b'{"step": '  # of every line


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The `StepReport`s in the `metrics.jsonl` of `folder`, as dicts; none where there is no such file.

    Lines that a kill cut short are left out.
    """
    path = Path(folder) / METRICS
    steps = {figures["step"]: figures for _, figures in _lines(path) if figures} if path.exists() else {}
    return list(steps.values())


def foreign_lines(path: Path) -> list[int]:
    """The numbers of the lines in the file `path` that no trainer of ours wrote, from 1; nor is a last one half one."""
    return [number for number, figures in _lines(path) if figures is None]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of each line, and its figures: none for the half of a line at the end, `None` where it is not ours."""
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        yield number, _figures(line)
    if last:
        yield len(lines) + 1, _figures(last) or ({} if last[: len(_START)] == _START[: len(last)] else None)


def _figures(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(found, dict) and list(found) == _NAMES and all(type(x) in (int, float) for x in found.values())
    return found if numbers and type(found["step"]) is int and found["step"] > 0 else None
