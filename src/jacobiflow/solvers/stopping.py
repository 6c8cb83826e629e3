"""When a swept token is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stopping:
    """Done at a residual of at most `atol`, or after `max_sweeps` sweeps, whichever comes first; `None`: no such end.

    `max_sweeps` is one number, or one for each segment of a `Segments` partition. Build one by `Tolerance(atol)`,
    `MaxSweeps(count)`, or `Tolerance(atol) | MaxSweeps(count)`.
    """

    atol: float | None = None
    max_sweeps: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.atol is None and self.max_sweeps is None:
            raise ValueError("Stopping: give a tolerance, a number of sweeps, or both")
        if self.atol is not None and not (isinstance(self.atol, int | float) and 0 <= self.atol < math.inf):
            raise ValueError(f"tolerance {self.atol}: give 0 (down to rounding) or a positive number")
        counts = self.max_sweeps if isinstance(self.max_sweeps, tuple) else (self.max_sweeps,)
        if self.max_sweeps is not None and not all(type(count) is int and count > 0 for count in counts or (0,)):
            raise ValueError(f"sweeps {self.max_sweeps!r}: give a positive whole number of sweeps, or one per segment")

    def __or__(self, other: Stopping) -> Stopping:
        for name in ("atol", "max_sweeps"):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                raise ValueError(f"{self} | {other}: both give {name}; give it once")
        return Stopping(
            self.atol if other.atol is None else other.atol,
            self.max_sweeps if other.max_sweeps is None else other.max_sweeps,
        )


def Tolerance(atol: float) -> Stopping:
    """A token is done, per sample, when a sweep changed it and all tokens before it by at most `atol`.

    The paper's error bound ebound on ||X^(k+1) - X^(k)|| / (B T C) depends on the batch; a batch whose every entry
    moves by `atol` has ebound = atol / sqrt(B T C).
    """
    return Stopping(atol=atol)


def MaxSweeps(count: int | Sequence[int]) -> Stopping:
    """A token is done after `count` sweeps, converged or not: the paper's J.

    A sequence has a count for each segment of a `Segments` partition: more sweeps where a block is tough (end of
    section 3.4 of the paper).
    """
    return Stopping(max_sweeps=tuple(count) if isinstance(count, Sequence) else count)
