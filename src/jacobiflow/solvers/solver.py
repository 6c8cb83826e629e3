"""How to solve a block, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacobiflow.checks import check_count, check_fields
from jacobiflow.errors import InputValueError
from jacobiflow.solvers.correction import Correction, Plain
from jacobiflow.solvers.guess import Guess, Latent
from jacobiflow.solvers.partition import Partition, Segments, Whole
from jacobiflow.solvers.stopping import Stopping, Tolerance


@dataclass(frozen=True)
class Solver:
    """How to solve a block: four independent pieces, and sweeps in bfloat16 that come first.

    `Solver(Sequential())` is the exact loop, `Solver(Whole())` Jacobi, `Solver(Segments(G), stopping=MaxSweeps(J))`
    the paper's GS-Jacobi, `Solver(Window(n))` a sliding window. With `coarse`, so many sweeps of all tokens are made
    from the guess by the network in bfloat16, whose answer is then the guess: where that is several times as fast, the
    pieces have only the last digits to find. A solver that goes token by token has no use for them.

    **Raises** `TypeError` where a piece is of the wrong kind, `ValueError` where the pieces do not go together.
    """

    partition: Partition = field(default_factory=Whole)
    guess: Guess = field(default_factory=Latent)
    stopping: Stopping = field(default_factory=lambda: Tolerance(1e-3))
    correction: Correction = field(default_factory=Plain)
    coarse: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("coarse", self.coarse, 0)
        counts = self.stopping.max_sweeps
        if isinstance(counts, tuple) and not (
            isinstance(self.partition, Segments) and self.partition.count == len(counts)
        ):
            raise InputValueError(f"{len(counts)} sweep counts for {self.partition}: give one for each of its Segments")
        self._check_coarse(all(self.partition.token_by_token(length) for length in (2, 3)))

    def check(self, num_tokens: int, token_channels: int) -> None:
        """**Raises** `ValueError` where a piece does not fit tokens (T, C)."""
        self.partition.check(num_tokens)
        self._check_coarse(self.partition.token_by_token(num_tokens))
        self.guess.check(num_tokens, token_channels)
        self.correction.check(token_channels)

    def _check_coarse(self, token_by_token: bool) -> None:
        if self.coarse and token_by_token:
            raise InputValueError(
                f"coarse={self.coarse}: {self.partition} solves token by token, whatever the guess is; give 0"
            )
