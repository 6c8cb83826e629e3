"""A solver as data: three pieces, of which the stopping rules are defined here."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.guess import Guess, Latent
from jacobiflow.fixed_point.partition import Partition, Segments, Whole
from jacobiflow.utils.checks import check_count, check_fields, check_number, check_positive


@dataclass(frozen=True)
class Stopping:
    """Rules that end the sweeps of tokens which have not come within the tolerance; the first that applies counts.

    Args:
        max_sweeps: A token is final after this many sweeps, within the tolerance or not: the paper's J. A tuple has a
            number for each segment of a `Segments` partition (end of section 3.4 of the paper).
        ebound: All tokens of a run are final when a sweep changed it little: ||X^(k+1) - X^(k)|| / (B T C) <= `ebound`,
            line 6 of the paper's Algorithm 1. The norm is over the tokens of the run and the whole batch, so that the
            rule depends on the batch; T counts all tokens of the sequence.

    Example:
        >>> solver = jf.Solver(jf.Segments(2), stopping=jf.Stopping(max_sweeps=(8, 3)))
    """

    max_sweeps: int | tuple[int, ...] | None = None
    ebound: float | None = None

    def __post_init__(self) -> None:
        if self.ebound is not None:
            check_number("ebound", self.ebound)
        if self.max_sweeps is not None:
            counts = self.max_sweeps if isinstance(self.max_sweeps, tuple) else (self.max_sweeps,)
            if not counts:
                raise InputValueError("max_sweeps=(): give a number, or one for each segment")
            for count in counts:
                check_count("max_sweeps", count)
        check_fields(self)


@dataclass(frozen=True)
class Solver:
    """A way to solve a block: three independent pieces.

    `Solver(Sequential())` is the exact loop, `Solver(Whole())` Jacobi, `Solver(Segments(G), stopping=Stopping(J))` the
    paper's GS-Jacobi, `Solver(Window(n))` a sliding window. The tolerance is that of `solve` or of a `Strategy`.

    Args:
        partition: Chooses the tokens that are swept together.
        guess: Starts the iteration.
        stopping: Rules besides the tolerance; none by default.
        tolerance_factor: A token is final when a sweep changes it, and all tokens before it, by at most this multiple
            of the tolerance.

    Example:
        >>> jf.Solver(jf.Window(32), jf.Zeros()).partition
        Window(size=32)
    """

    partition: Partition = field(default_factory=Whole)
    guess: Guess = field(default_factory=Latent)
    stopping: Stopping = field(default_factory=Stopping)
    tolerance_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive("tolerance_factor", self.tolerance_factor)
        counts = self.stopping.max_sweeps
        if isinstance(counts, tuple) and self.partition != Segments(len(counts)):
            raise InputValueError(f"{len(counts)} sweep counts for {self.partition}: give one for each of its Segments")

    def check(self, num_tokens: int, tolerance: float | None) -> None:
        """Raises ValueError if the partition does not fit the tokens, or if nothing would end the sweeps."""
        self.partition.check(num_tokens)
        has_end = tolerance is not None or self.stopping != Stopping()
        if not has_end and not self.partition.token_by_token(num_tokens):
            message = f"nothing would end the sweeps of {self.partition}; give a tolerance, or a number of sweeps"
            raise InputValueError(message, argument="tolerance", value=tolerance)
