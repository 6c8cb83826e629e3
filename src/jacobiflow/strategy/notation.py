"""Strategies as text: "sequential", "jacobi-30", "window:24", and the paper's [Stack-GS-J-Else]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from jacobiflow.checks import short
from jacobiflow.codec import registered
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.solvers import (
    Correction,
    EarlyStop,
    Guess,
    MaxSweeps,
    Partition,
    Segments,
    Sequential,
    Solver,
    Stopping,
    Tolerance,
    Whole,
)

DEFAULT_TOLERANCE = 1e-3
FORMS = (
    "auto, sequential, jacobi, jacobi-J, gs-jacobi:G, gs-jacobi:G-J, window:N, or [Stack-GS-J-Else] such as [7-8-32-10]"
)
_NUMBER = "[0-9]{1,9}"


def parse(text: str, guesses: Sequence[Guess], num_tokens: int, tolerance: float) -> tuple[Solver, ...]:
    """The solvers that `text` names, one per block; `guesses` are for blocks without one. See `Strategy.parse`."""
    if text.strip().startswith("["):
        stack = _parse_paper(text.strip(), len(guesses), num_tokens)
        return tuple(replace(solver, guess=guess) for solver, guess in zip(stack, guesses, strict=True))
    solver = _named(text, num_tokens, tolerance)
    if text.strip().lower().partition(":")[0] == "auto":
        raise InputValueError(
            "strategy 'auto' is planned for a flow, a device and a batch: give it to sample, or use plan"
        )
    if solver is None:
        raise InputValueError(f"strategy {short(text)}: unknown; give {FORMS}")
    if any(_piece(Guess, piece, text) for piece in _words(text)[1:]):
        return (solver,) * len(guesses)
    return tuple(replace(solver, guess=guess) for guess in guesses)


# --------------------------------------------------------------------------------------------- the same for all blocks


def _named(text: str, num_tokens: int | None = None, tolerance: float = DEFAULT_TOLERANCE) -> Solver | None:
    """The solver that a name gives every block, or `None` if it is not a name."""
    name, *pieces = _words(text)
    to_tolerance, early = Tolerance(tolerance), EarlyStop()
    if name == "original":
        solver = Solver(Sequential(), stopping=to_tolerance)
    elif name == "jacobi":
        solver = Solver(Whole(), stopping=to_tolerance)
    elif match := re.fullmatch(rf"jacobi-({_NUMBER})", name):
        solver = Solver(Whole(), stopping=_sweeps(text, match[1], "J") | early)
    elif match := re.fullmatch(rf"gs-jacobi:({_NUMBER})(?:-({_NUMBER}))?", name):
        stopping = to_tolerance if match[2] is None else _sweeps(text, match[2], "J") | early
        solver = Solver(_segments(text, match[1], "G", num_tokens), stopping=stopping)
    else:
        partition = _piece(Partition, name, text)
        if not isinstance(partition, Partition):
            return None
        if num_tokens is not None:
            partition.check(num_tokens)
        solver = Solver(partition, stopping=to_tolerance)
    for piece in pieces:
        guess, correction = _piece(Guess, piece, text), _piece(Correction, piece, text)
        if guess is None and correction is None:
            return None
        solver = replace(solver, correction=correction) if guess is None else replace(solver, guess=guess)
    return solver


def _words(text: str) -> list[str]:
    """The name, and the guesses and corrections that are added to it."""
    return text.strip().lower().split("+")


def _piece(base: type, text: str, whole: str) -> Any:
    """The registered piece that "name" or "name:1-2" means, the numbers being its fields, or `None`."""
    name, _, numbers = text.partition(":")
    cls: Any = {key.lower(): cls for key, cls in registered(base).items()}.get(name)
    if cls is None or not re.fullmatch(rf"|{_NUMBER}(-{_NUMBER})*", numbers):
        return None
    values = [int(number) for number in numbers.split("-") if number]
    needed = [entry for entry in fields(cls) if entry.default is MISSING and entry.default_factory is MISSING]
    if not len(needed) <= len(values) <= len(fields(cls)) or any(
        entry.type not in ("int", int) for entry in fields(cls)
    ):
        return None
    try:
        return cls(*values)
    except InputError as error:
        raise InputValueError(f"strategy {short(whole)}: {error}") from error


# ------------------------------------------------------------------------------------------------- the paper's notation


def _parse_paper(text: str, num_blocks: int, num_tokens: int) -> tuple[Solver, ...]:
    parts = text[1:-1].split("-") if text.endswith("]") else []
    if len(parts) != 4:
        raise InputValueError(f"strategy {short(text)}: give four fields, [Stack-GS-J-Else], such as [7-8-32-10]")
    stack, counts, sweeps, other = (
        _numbers(text, part, name) for part, name in zip(parts, ("Stack", "GS", "J", "Else"), strict=True)
    )
    if len(other) != 1:
        raise InputValueError(f"strategy {short(text)}: Else is one number, not {parts[3]!r}")
    for values, name, part in ((counts, "GS", parts[1]), (sweeps, "J", parts[2])):
        if len(values) not in (1, len(stack)):
            raise InputValueError(
                f"strategy {short(text)}: give {name} {part!r} one number, or one for each of {parts[0]!r}"
            )
    blocks = [int(block) for block in stack]
    if len(set(blocks)) < len(blocks):
        raise InputValueError(f"strategy {short(text)}: Stack {parts[0]!r} names a block twice")
    solvers = [Solver(Whole(), stopping=_sweeps(text, other[0], "Else") | EarlyStop())] * num_blocks
    for i, block in enumerate(blocks):
        if block >= num_blocks:
            raise InputValueError(
                f"strategy {short(text)}: Stack names block {block}, the flow has 0 to {num_blocks - 1}"
            )
        partition = _segments(text, counts[i % len(counts)], "GS", num_tokens)
        stopping = _sweeps(text, sweeps[i % len(sweeps)], "J", partition.count) | EarlyStop()
        solvers[block] = Solver(partition, stopping=stopping)
    return tuple(solvers)


def _numbers(text: str, part: str, name: str) -> list[str]:
    number = f"{_NUMBER}(,{_NUMBER})*" if name == "J" else _NUMBER
    if not re.fullmatch(f"{number}(/{number})*", part):
        raise InputValueError(
            f"strategy {short(text)}: {name} {part!r} is not a whole number, or several with slashes between"
        )
    return part.split("/")


def _segments(text: str, number: str, name: str, num_tokens: int | None) -> Segments:
    count = _positive(text, number, name)
    if num_tokens is not None and count > num_tokens:
        raise InputValueError(
            f"strategy {short(text)}: {name} {number} asks for more segments than there are tokens, {num_tokens}"
        )
    return Segments(count)


def _sweeps(text: str, numbers: str, name: str, segments: int = 1) -> Stopping:
    """One number, or with commas between one for each segment."""
    counts = [_positive(text, number, name) for number in numbers.split(",")]
    if len(counts) not in (1, segments):
        raise InputValueError(
            f"strategy {short(text)}: {name} {numbers} has {len(counts)} counts for {segments} segments"
        )
    return MaxSweeps(counts[0] if len(counts) == 1 else counts)


def _positive(text: str, number: str, name: str) -> int:
    if int(number) < 1:
        raise InputValueError(f"strategy {short(text)}: {name} {number}: give a positive whole number")
    return int(number)
