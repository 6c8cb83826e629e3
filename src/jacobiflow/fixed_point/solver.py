"""A solver as data: four pieces, and the rules that end the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.fixed_point.correction import Correction, Plain
from jacobiflow.fixed_point.guess import Guess, Latent
from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
from jacobiflow.fixed_point.partition import Partition, Segments, Whole
from jacobiflow.utils.checks import check_count, check_fields, check_kind, check_number


@dataclass(frozen=True)
class Stopping:
    """Rules of which the first that holds ends the sweeps; `None`: no such rule.

    Build one by `Tolerance(atol)`, `MaxSweeps(count)`, `EarlyStop(ebound)`, or several of them joined by `|`.
    """

    atol: float | None = None
    max_sweeps: int | tuple[int, ...] | None = None
    ebound: float | None = None

    def __post_init__(self) -> None:
        if not self._rules():
            raise InputTypeError("Stopping: give a tolerance, a number of sweeps, or an ebound")
        if self.atol is not None:
            check_number("tolerance", self.atol, expected="0 (down to rounding) or a positive number")
        if self.ebound is not None:
            check_number("ebound", self.ebound)
        if self.max_sweeps is not None:
            counts = self.max_sweeps if isinstance(self.max_sweeps, tuple) else (self.max_sweeps,)
            if not counts:
                raise InputValueError("sweeps=(): give a number, or one for each segment")
            for count in counts:
                check_count("sweeps", count)
        check_fields(self)

    def __or__(self, other: Stopping) -> Stopping:
        check_kind("stopping", other, Stopping, "a rule such as Tolerance(1e-3) or MaxSweeps(8)")
        mine, others = self._rules(), other._rules()
        if both := mine.keys() & others.keys():
            raise InputValueError(f"{self} | {other}: both give {', '.join(both)}; give it once")
        return Stopping(**mine, **others)

    @property
    def is_tolerance(self) -> bool:
        """Tells if a tolerance is the only rule."""
        return list(self._rules()) == ["atol"]

    def _rules(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def Tolerance(atol: float) -> Stopping:
    """A token is final, per sample, when a sweep changed it and all tokens before it by at most `atol`.

    Example:
        >>> solver = jf.Solver(jf.Whole(), stopping=jf.Tolerance(1e-4))
    """
    return Stopping(atol=atol)


def MaxSweeps(count: int | Sequence[int]) -> Stopping:
    """A token is final after `count` sweeps, converged or not: the paper's J.

    A sequence has a count for each segment of a `Segments` partition (end of section 3.4 of the paper).

    Example:
        >>> solver = jf.Solver(jf.Segments(2), stopping=jf.MaxSweeps([8, 3]))
    """
    return Stopping(max_sweeps=tuple(count) if isinstance(count, Sequence) else count)


def EarlyStop(ebound: float = 1e-8) -> Stopping:
    """All tokens of a run are final when a sweep changed it little: ||X^(k+1) - X^(k)|| / (B T C) <= `ebound`.

    It is line 6 of the paper's Algorithm 1. The norm is over the tokens of the run and the whole batch, so that the
    rule depends on the batch; T counts all tokens of the sequence.

    Example:
        >>> solver = jf.Solver(jf.Whole(), stopping=jf.EarlyStop(1e-6) | jf.MaxSweeps(20))
    """
    return Stopping(ebound=ebound)


@dataclass(frozen=True)
class Solver:
    """A way to solve a block: four independent pieces, and sweeps in bfloat16 that come first.

    `Solver(Sequential())` is the exact loop, `Solver(Whole())` Jacobi, `Solver(Segments(G), stopping=MaxSweeps(J))`
    the paper's GS-Jacobi, `Solver(Window(n))` a sliding window. With `bf16_sweeps`, so many sweeps of all tokens come
    first, by the network in bfloat16; their answer is then the guess.

    Example:
        >>> jf.Solver(jf.Window(32), jf.Zeros(), jf.Tolerance(1e-3)).partition
        Window(size=32)
    """

    partition: Partition = field(default_factory=Whole)
    guess: Guess = field(default_factory=Latent)
    stopping: Stopping = field(default_factory=lambda: Tolerance(DEFAULT_TOLERANCE))
    correction: Correction = field(default_factory=Plain)
    bf16_sweeps: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("bf16_sweeps", self.bf16_sweeps, 0)
        counts = self.stopping.max_sweeps
        if isinstance(counts, tuple) and self.partition != Segments(len(counts)):
            raise InputValueError(f"{len(counts)} sweep counts for {self.partition}: give one for each of its Segments")

    def check(self, num_tokens: int, token_channels: int) -> None:
        """Raises ValueError if a piece does not fit tokens (T, C)."""
        self.partition.check(num_tokens)
        self.guess.check(num_tokens, token_channels)
        self.correction.check(token_channels)
        if self.bf16_sweeps and self.partition.token_by_token(num_tokens):
            raise InputValueError(f"bf16_sweeps={self.bf16_sweeps}: {self.partition} solves token by token; give 0")
