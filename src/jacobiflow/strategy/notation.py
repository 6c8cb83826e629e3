"""Strategies as text: "sequential", "jacobi-30", "window:24", and the paper's [Stack-GS-J-Else]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jacobiflow.solvers import Latent, MaxSweeps, Segments, Sequential, Solver, Stopping, Tolerance, Whole, Window

AUTO_WINDOW = 32
DEFAULT_TOLERANCE = 1e-3
FORMS = (
    "auto, sequential, jacobi, jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, [Stack-GS-J-Else] such as [7-8-32-10], "
    "or a .json file"
)


def parse(text: str, num_blocks: int, num_tokens: int, tolerance: float) -> tuple[Solver, ...]:
    """The solvers that `text` names, one per block, each from the `Latent` guess; see `Strategy.parse`."""
    name = text.strip().lower()
    if name.startswith("["):
        return _parse_paper(text.strip(), num_blocks, num_tokens)
    to_tolerance = Tolerance(tolerance)
    if name in ("sequential", "original"):
        solver = Solver(Sequential(), stopping=to_tolerance)
    elif name == "auto":
        solver = Solver(Window(AUTO_WINDOW), stopping=to_tolerance)
    elif name == "jacobi":
        solver = Solver(Whole(), stopping=to_tolerance)
    elif match := re.fullmatch(r"jacobi-(\d+)", name):
        solver = Solver(Whole(), stopping=_sweeps(text, match[1], "J"))
    elif match := re.fullmatch(r"gs-jacobi:(\d+)", name):
        solver = Solver(_segments(text, match[1], "G", num_tokens), stopping=to_tolerance)
    elif match := re.fullmatch(r"gs-jacobi:(\d+)-(\d+)", name):
        solver = Solver(_segments(text, match[1], "G", num_tokens), stopping=_sweeps(text, match[2], "J"))
    elif match := re.fullmatch(r"window:(\d+)", name):
        solver = Solver(Window(_positive(text, match[1], "N")), stopping=to_tolerance)
    else:
        raise ValueError(f"strategy {text!r}: unknown; give {FORMS}")
    return (solver,) * num_blocks


def show(solvers: Sequence[Solver]) -> str | None:
    """A text that `parse` turns into `solvers`, but for their guesses; `None` where there is none."""
    plain = [replace(solver, guess=Latent()) for solver in solvers]
    if len(set(plain)) == 1 and (name := _name(plain[0])):
        return name
    stack = {i: solver.partition.count for i, solver in enumerate(plain) if isinstance(solver.partition, Segments)}
    if any(isinstance(solver.partition, Sequential | Window) or solver.stopping.atol is not None for solver in plain):
        return None
    counts = [solver.stopping.max_sweeps for solver in plain]
    other = {counts[i] for i in range(len(plain)) if i not in stack} or {1}
    if any(isinstance(count, tuple) for count in counts) or len(other) > 1:
        return None
    fields = (list(stack), _shared(list(stack.values())), _shared([counts[i] for i in stack]))
    return f"[{'-'.join('/'.join(map(str, field)) for field in fields)}-{other.pop()}]"


def _name(solver: Solver) -> str | None:
    """The name of a strategy that treats all blocks alike."""
    partition, sweeps = solver.partition, solver.stopping.max_sweeps
    if solver.stopping == Tolerance(DEFAULT_TOLERANCE):
        if isinstance(partition, Sequential):
            return "Original"
        if isinstance(partition, Whole):
            return "jacobi"
        if isinstance(partition, Segments):
            return f"gs-jacobi:{partition.count}"
        if isinstance(partition, Window):
            return f"window:{partition.size}"
    if solver.stopping.atol is None and isinstance(sweeps, int) and isinstance(partition, Whole):
        return f"Jacobi-{sweeps}"
    return None


def _shared(values: list[Any]) -> list[Any]:
    return values[:1] if len(set(values)) == 1 else values


def _parse_paper(text: str, num_blocks: int, num_tokens: int) -> tuple[Solver, ...]:
    fields = text[1:-1].split("-") if text.endswith("]") else []
    if len(fields) != 4:
        raise ValueError(f"strategy {text!r}: give four fields, [Stack-GS-J-Else], such as [7-8-32-10]")
    stack, counts, sweeps, other = (
        _numbers(text, field, name) for field, name in zip(fields, ("Stack", "GS", "J", "Else"), strict=True)
    )
    if len(other) != 1:
        raise ValueError(f"strategy {text!r}: Else is one number, not {fields[3]!r}")
    for values, name, field in ((counts, "GS", fields[1]), (sweeps, "J", fields[2])):
        if len(values) not in (1, len(stack)):
            raise ValueError(f"strategy {text!r}: give {name} {field!r} one number, or one for each of {fields[0]!r}")
    blocks = [int(block) for block in stack]
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"strategy {text!r}: Stack {fields[0]!r} names a block twice")
    solvers = [Solver(Whole(), stopping=_sweeps(text, other[0], "Else"))] * num_blocks
    for i, block in enumerate(blocks):
        if block >= num_blocks:
            raise ValueError(f"strategy {text!r}: Stack names block {block}, the flow has 0 to {num_blocks - 1}")
        partition = _segments(text, counts[i % len(counts)], "GS", num_tokens)
        solvers[block] = Solver(partition, stopping=_sweeps(text, sweeps[i % len(sweeps)], "J"))
    return tuple(solvers)


def _numbers(text: str, field: str, name: str) -> list[str]:
    if not re.fullmatch(r"\d{1,9}(/\d{1,9})*", field, re.ASCII):
        raise ValueError(f"strategy {text!r}: {name} {field!r} is not a whole number, or several with slashes between")
    return field.split("/")


def _segments(text: str, number: str, name: str, num_tokens: int) -> Segments:
    count = _positive(text, number, name)
    if count > num_tokens:
        raise ValueError(
            f"strategy {text!r}: {name} {number} asks for more segments than there are tokens, {num_tokens}"
        )
    return Segments(count)


def _sweeps(text: str, number: str, name: str) -> Stopping:
    return MaxSweeps(_positive(text, number, name))


def _positive(text: str, number: str, name: str) -> int:
    if int(number) < 1:
        raise ValueError(f"strategy {text!r}: {name} {number}: give a positive whole number")
    return int(number)
