"""Strategies by name: "sequential", "jacobi", "window:24", the paper's [Stack-GS-J-Else], or a JSON file."""

from __future__ import annotations

import re
from pathlib import Path

from jacobiflow.solvers import MaxSweeps, Segments, Sequential, Solver, Stopping, Tolerance, Whole, Window
from jacobiflow.strategy.strategy import Strategy

DEFAULT_TOLERANCE = 1e-3
AUTO_WINDOW = 32
FORMS = (
    "auto, sequential, jacobi, jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, [Stack-GS-J-Else] such as [7-8-32-10], "
    "or a .json file"
)


def resolve(strategy: str | Path | Strategy, num_blocks: int, num_tokens: int, tolerance: float | None) -> Strategy:
    """The strategy that `strategy` names, for a flow of `num_blocks` blocks of `num_tokens` tokens.

    **Arguments:** `tolerance` replaces every tolerance that the strategy has, and is refused where it has none; `None`
    leaves a `Strategy` or file its own and gives a name 1e-3. Names: "auto" (for now `Window(32)` in every block),
    "sequential", "jacobi" (to the tolerance), "jacobi-30" (30 sweeps: the paper's Jacobi-30), "gs-jacobi:8" (8
    segments, to the tolerance), "gs-jacobi:8-32" (8 segments of 32 sweeps), "window:24", and the paper's notation
    [Stack-GS-J-Else], where several stacked blocks, and several GS and J, are separated by slashes:
    "[0/7-256/8-1/13-6]".

    **Raises** `ValueError` that quotes the part at fault.
    """
    if isinstance(strategy, str) and not strategy.endswith(".json"):
        stopping = Tolerance(DEFAULT_TOLERANCE if tolerance is None else tolerance)
        found = _parse(strategy.strip(), num_blocks, stopping)
    else:
        found = strategy if isinstance(strategy, Strategy) else Strategy.load(strategy)
        if tolerance is not None:
            found = found.with_tolerance(tolerance)
    if tolerance is not None and all(solver.stopping.atol is None for solver in found.solvers):
        raise ValueError(
            f"tolerance {tolerance}: strategy {strategy!r} stops after a number of sweeps and would not heed it; "
            "leave the tolerance out, or give a strategy that has one"
        )
    if len(found.solvers) != num_blocks:
        raise ValueError(f"strategy for {len(found.solvers)} blocks, but the flow has {num_blocks}")
    for solver in found.solvers:
        solver.partition.check(num_tokens)
    return found


def _parse(text: str, num_blocks: int, to_tolerance: Stopping) -> Strategy:
    name = text.lower()
    if name.startswith("["):
        return _parse_paper(text, num_blocks)
    if name in ("sequential", "original"):
        solver = Solver(Sequential(), stopping=to_tolerance)
    elif name == "auto":
        solver = Solver(Window(AUTO_WINDOW), stopping=to_tolerance)
    elif name == "jacobi":
        solver = Solver(Whole(), stopping=to_tolerance)
    elif match := re.fullmatch(r"jacobi-(\d+)", name):
        solver = Solver(Whole(), stopping=MaxSweeps(int(match[1])))
    elif match := re.fullmatch(r"gs-jacobi:(\d+)", name):
        solver = Solver(Segments(int(match[1])), stopping=to_tolerance)
    elif match := re.fullmatch(r"gs-jacobi:(\d+)-(\d+)", name):
        solver = Solver(Segments(int(match[1])), stopping=MaxSweeps(int(match[2])))
    elif match := re.fullmatch(r"window:(\d+)", name):
        solver = Solver(Window(int(match[1])), stopping=to_tolerance)
    else:
        raise ValueError(f"strategy {text!r}: unknown; give {FORMS}")
    return Strategy.uniform(solver, num_blocks)


def _parse_paper(text: str, num_blocks: int) -> Strategy:
    fields = text[1:-1].split("-") if text.endswith("]") else []
    if len(fields) != 4:
        raise ValueError(f"strategy {text!r}: give four fields, [Stack-GS-J-Else], such as [7-8-32-10]")
    stack, segments, sweeps, other = (
        _numbers(text, field, name) for field, name in zip(fields, ("Stack", "GS", "J", "Else"), strict=True)
    )
    if len(other) != 1:
        raise ValueError(f"strategy {text!r}: Else is one number, not {fields[3]!r}")
    for values, name, field in ((segments, "GS", fields[1]), (sweeps, "J", fields[2])):
        if len(values) not in (1, len(stack)):
            raise ValueError(f"strategy {text!r}: give {name} {field!r} one number, or one for each of {fields[0]!r}")
    if len(set(stack)) < len(stack):
        raise ValueError(f"strategy {text!r}: Stack {fields[0]!r} names a block twice")
    solvers = [Solver(Whole(), stopping=MaxSweeps(other[0]))] * num_blocks
    for i, block in enumerate(stack):
        if block >= num_blocks:
            raise ValueError(f"strategy {text!r}: Stack names block {block}, the flow has 0 to {num_blocks - 1}")
        count, sweep = segments[i % len(segments)], sweeps[i % len(sweeps)]
        solvers[block] = Solver(Segments(count), stopping=MaxSweeps(sweep))
    return Strategy(tuple(solvers))


def _numbers(text: str, field: str, name: str) -> list[int]:
    if not re.fullmatch(r"\d+(/\d+)*", field):
        raise ValueError(f"strategy {text!r}: {name} {field!r} is not a whole number, or several with slashes between")
    return [int(part) for part in field.split("/")]
