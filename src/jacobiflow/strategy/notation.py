"""Strategies as text: "sequential", "jacobi-30", "window:24", and the paper's [Stack-GS-J-Else]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jacobiflow.solvers import Latent, MaxSweeps, Segments, Sequential, Solver, Stopping, Tolerance, Whole, Window

DEFAULT_TOLERANCE = 1e-3
FORMS = (
    "auto, sequential, jacobi, jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, or [Stack-GS-J-Else] such as [7-8-32-10]"
)


def parse(text: str, num_blocks: int, num_tokens: int, tolerance: float) -> tuple[Solver, ...]:
    """The solvers that `text` names, one per block, each from the `Latent` guess; see `Strategy.parse`."""
    if text.strip().startswith("["):
        return _parse_paper(text.strip(), num_blocks, num_tokens)
    solver = _named(text, num_tokens, tolerance)
    if text.strip().lower() == "auto":
        raise ValueError("strategy 'auto' is planned for a flow, a device and a batch: give it to sample, or use plan")
    if solver is None:
        raise ValueError(f"strategy {text!r}: unknown; give {FORMS}")
    return (solver,) * num_blocks


def _named(text: str, num_tokens: int | None = None, tolerance: float = DEFAULT_TOLERANCE) -> Solver | None:
    """The solver that a name gives every block, or `None` where it is no name."""
    name, to_tolerance = text.strip().lower(), Tolerance(tolerance)
    if name in ("sequential", "original"):
        return Solver(Sequential(), stopping=to_tolerance)
    if name == "jacobi":
        return Solver(Whole(), stopping=to_tolerance)
    if match := re.fullmatch(r"jacobi-([0-9]{1,9})", name):
        return Solver(Whole(), stopping=_sweeps(text, match[1], "J"))
    if match := re.fullmatch(r"gs-jacobi:([0-9]{1,9})", name):
        return Solver(_segments(text, match[1], "G", num_tokens), stopping=to_tolerance)
    if match := re.fullmatch(r"gs-jacobi:([0-9]{1,9})-([0-9]{1,9})", name):
        return Solver(_segments(text, match[1], "G", num_tokens), stopping=_sweeps(text, match[2], "J"))
    if match := re.fullmatch(r"window:([0-9]{1,9})", name):
        return Solver(Window(_positive(text, match[1], "N")), stopping=to_tolerance)
    return None


def show(solvers: Sequence[Solver]) -> str | None:
    """A text that `parse` turns into `solvers`, but for their guesses; `None` where there is none."""
    plain = tuple(replace(solver, guess=Latent()) for solver in solvers)
    if len(set(plain)) == 1 and (name := _name(plain[0])):
        return name
    stack = {i: solver.partition.count for i, solver in enumerate(plain) if isinstance(solver.partition, Segments)}
    counts = [solver.stopping.max_sweeps for solver in plain]
    other = next((count for i, count in enumerate(counts) if i not in stack), 1)
    fields = (list(stack), _shared(list(stack.values())), _shared([counts[i] for i in stack]), [other])
    text = f"[{'-'.join('/'.join(map(str, field)) for field in fields)}]"
    try:  # what there is no notation for comes back as something else, or not at all
        return text if _parse_paper(text, len(plain), max(stack.values(), default=1)) == plain else None
    except ValueError:
        return None


def _name(solver: Solver) -> str | None:
    """The name of a strategy that treats all blocks alike."""
    partition = solver.partition
    names = ["Original", "jacobi", f"Jacobi-{solver.stopping.max_sweeps}"]
    if isinstance(partition, Segments):
        names.append(f"gs-jacobi:{partition.count}")
    if isinstance(partition, Window):
        names.append(f"window:{partition.size}")
    return next((name for name in names if _named(name) == solver), None)


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
    if not re.fullmatch(r"[0-9]{1,9}(/[0-9]{1,9})*", field):
        raise ValueError(f"strategy {text!r}: {name} {field!r} is not a whole number, or several with slashes between")
    return field.split("/")


def _segments(text: str, number: str, name: str, num_tokens: int | None) -> Segments:
    count = _positive(text, number, name)
    if num_tokens is not None and count > num_tokens:
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
