"""Strategies as text: "sequential", "jacobi-30", "window:24", and the paper's [Stack-GS-J-Else]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import (
    Guess,
    Partition,
    Segments,
    Sequential,
    Solver,
    Stopping,
    Whole,
)
from jacobiflow.fixed_point.registry import check_not_retired, registered_pieces
from jacobiflow.utils.checks import format_value

_FORMS = (
    "auto, sequential, jacobi, jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, or [Stack-GS-J-Else] such as [7-8-32-10]"
)
_EBOUND = 1e-8
"""The early stop of the paper's Algorithm 1."""
_NUMBER = "[0-9]{1,9}"
_NUMBERS = f"{_NUMBER}(?:/{_NUMBER})*"
_SWEEPS = f"{_NUMBER}(?:[,/]{_NUMBER})*"


def parse(text: str, guesses: Sequence[Guess]) -> tuple[Solver, ...]:
    """Returns the solvers that `text` names, one per block; `guesses` are for blocks without one.

    See `Strategy.parse`.
    """
    name, *pieces = text.strip().lower().split("+")
    try:
        is_stack = name.startswith("[")
        solvers = _parse_stack(name, len(guesses)) if is_stack else [_parse_name(name)] * len(guesses)
        solvers = [replace(solver, guess=guess) for solver, guess in zip(solvers, guesses, strict=True)]
        for piece in pieces:
            solvers = [_add_piece(solver, piece) for solver in solvers]
    except ValueError as error:
        raise InputValueError(f"strategy {format_value(text)}: {error}") from error
    return tuple(solvers)


def is_auto(name: str) -> bool:
    """Tells if `name` is "auto" or "auto:TOLERANCE"."""
    return name.strip().lower().split(":")[0] == "auto"


def _parse_name(name: str) -> Solver:
    """The solver that a name gives every block."""
    if is_auto(name):
        raise InputValueError("is planned for a flow, a device and a batch: give it to sample, or use plan")
    if name == "sequential:int16":
        raise InputValueError('is no strategy any more; give "sequential"')
    partition: Partition | None
    sweeps = None
    if match := re.fullmatch(rf"jacobi(?:-({_NUMBER}))?", name):
        partition, sweeps = Whole(), match[1]
    elif match := re.fullmatch(rf"gs-jacobi:({_NUMBER})(?:-({_NUMBER}))?", name):
        partition, sweeps = Segments(int(match[1])), match[2]
    elif name == "original":
        partition = Sequential()
    else:
        partition = _parse_piece(Partition, name)
    if partition is None:
        raise InputValueError(f"unknown; give {_FORMS}")
    return Solver(partition, stopping=Stopping() if sweeps is None else _parse_sweeps(sweeps))


def _add_piece(solver: Solver, name: str) -> Solver:
    """The solver with a registered guess."""
    guess = _parse_piece(Guess, name)
    if guess is None:
        check_not_retired(name, "; leave it out, or call plan")
        raise InputValueError(f"{format_value(name)}: unknown; add the name of a guess")
    return replace(solver, guess=guess)


def _parse_piece(base: type, text: str) -> Any:
    """The registered piece that "name" or "name:1-2" means, the numbers being its fields, or `None`."""
    name, _, numbers = text.partition(":")
    cls: Any = {key.lower(): cls for key, cls in registered_pieces(base).items()}.get(name)
    if cls is None or not re.fullmatch(rf"|{_NUMBER}(-{_NUMBER})*", numbers):
        return None
    values = [int(number) for number in numbers.split("-") if number]
    required = [entry for entry in fields(cls) if entry.default is MISSING and entry.default_factory is MISSING]
    is_whole = all(entry.type in ("int", int) for entry in fields(cls))
    return cls(*values) if is_whole and len(required) <= len(values) <= len(fields(cls)) else None


def _parse_stack(text: str, num_blocks: int) -> list[Solver]:
    """The solvers of the paper's notation."""
    match = re.fullmatch(rf"\[({_NUMBERS})-({_NUMBERS})-({_SWEEPS})-({_NUMBER})\]", text)
    if match is None:
        raise InputValueError(
            "give whole numbers [Stack-GS-J-Else], several with slashes between: [7-8-32-10], [0/7-256/8-1/13-6]"
        )
    stack = [int(block) for block in match[1].split("/")]
    counts, sweeps = match[2].split("/"), match[3].split("/")
    if len(set(stack)) < len(stack) or max(stack) >= num_blocks:
        raise InputValueError(f"Stack {match[1]}: give blocks from 0 to {num_blocks - 1}, each once")
    for name, values in (("GS", counts), ("J", sweeps)):
        if len(values) not in (1, len(stack)):
            raise InputValueError(f"{name} {'/'.join(values)}: give one number, or one for each of Stack {match[1]}")
    solvers = [Solver(Whole(), stopping=_parse_sweeps(match[4]))] * num_blocks
    for i, block in enumerate(stack):
        partition = Segments(int(counts[i % len(counts)]))
        solvers[block] = Solver(partition, stopping=_parse_sweeps(sweeps[i % len(sweeps)]))
    return solvers


def _parse_sweeps(numbers: str) -> Stopping:
    """One number of sweeps, or one for each segment with commas between, and the paper's early stop."""
    counts = [int(number) for number in numbers.split(",")]
    return Stopping(counts[0] if len(counts) == 1 else tuple(counts), _EBOUND)
