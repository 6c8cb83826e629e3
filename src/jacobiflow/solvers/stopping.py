"""When a swept token is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral

from jacobiflow.checks import check_count, check_kind, check_number, convert_numbers
from jacobiflow.codec import OMIT_DEFAULT
from jacobiflow.errors import InputValueError


@dataclass(frozen=True)
class Stopping:
    """Rules of which the first that holds ends the sweeps; `None`: no such rule.

    Build one by `Tolerance(atol)`, `MaxSweeps(count)`, `EarlyStop(ebound)`, or several of them joined by `|`.

    **Attributes:** `atol`, see `Tolerance`; `max_sweeps`, see `MaxSweeps`: one number, or one for each segment of a
    `Segments` partition; `ebound`, see `EarlyStop`.

    **Raises** `ValueError` where a value is out of its range, or no rule is given, `TypeError` where it is no number.
    """

    atol: float | None = None
    max_sweeps: int | tuple[int, ...] | None = None
    ebound: float | None = field(default=None, metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        convert_numbers(self)
        for name, value in (("tolerance", self.atol), ("ebound", self.ebound)):
            if value is not None:
                check_number(name, value, give="0 (down to rounding) or a positive number")
        give = "a positive whole number, or a tuple of one for each segment"
        check_kind("sweeps", self.max_sweeps, int | tuple | None, give)
        if self.max_sweeps == ():
            raise InputValueError(f"sweeps=(): give {give}")
        for count in self.max_sweeps if isinstance(self.max_sweeps, tuple) else (self.max_sweeps,):
            if self.max_sweeps is not None:
                check_count("sweeps", count)
        if all(getattr(self, entry.name) is None for entry in fields(self)):
            raise InputValueError("Stopping: give a tolerance, a number of sweeps, or a bound of an early stop")

    def __or__(self, other: Stopping) -> Stopping:
        check_kind("stopping", other, Stopping, "a rule such as Tolerance(1e-3) or MaxSweeps(8)")
        joined = {}
        for name in (entry.name for entry in fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            if mine is not None and others is not None:
                raise InputValueError(f"{self} | {other}: both give {name}; give it once")
            joined[name] = others if mine is None else mine
        return Stopping(**joined)


def Tolerance(atol: float) -> Stopping:
    """A token is done, per sample, when a sweep changed it and all tokens before it by at most `atol`."""
    check_number("tolerance", atol, give="0 (down to rounding) or a positive number")
    return Stopping(atol=atol)


def MaxSweeps(count: int | Sequence[int]) -> Stopping:
    """A token is done after `count` sweeps, converged or not: the paper's J.

    A sequence has a count for each segment of a `Segments` partition: more sweeps where a block is tough (end of
    section 3.4 of the paper).
    """
    check_kind("sweeps", count, Integral | Sequence, "a positive whole number, or one for each segment")
    return Stopping(max_sweeps=tuple(count) if isinstance(count, Sequence) else count)


def EarlyStop(ebound: float = 1e-8) -> Stopping:
    """All tokens of a run are done when a sweep changed it little: ||X^(k+1) - X^(k)|| / (B T C) <= `ebound`.

    The norm is over the tokens of the run and the whole batch, so that the rule depends on the batch; T counts all
    tokens of the sequence. It is line 6 of the paper's Algorithm 1, where `ebound` is 1e-8. Where every entry of the
    sequence moves by d, the left side is d / sqrt(B T C).
    """
    check_number("ebound", ebound)
    return Stopping(ebound=ebound)
