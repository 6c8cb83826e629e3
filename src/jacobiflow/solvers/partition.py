"""Which tokens are swept together, and when a solver moves on.

A solver keeps a front: the tokens before it are final. A partition says where the run of swept tokens that starts at
the front ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Partition(Protocol):
    """Chooses the swept run [front, stop)."""

    def stop(self, front: int, num_tokens: int) -> int:
        """End of the run that starts at `front`; front < stop <= num_tokens."""
        ...

    def check(self, num_tokens: int) -> None:
        """**Raises** `ValueError` where the partition does not fit a sequence of `num_tokens`."""
        ...


@dataclass(frozen=True)
class Sequential:
    """One token at a time: T network calls on one token each. Exact."""

    def stop(self, front: int, num_tokens: int) -> int:
        return front + 1

    def check(self, num_tokens: int) -> None:
        pass


@dataclass(frozen=True)
class Whole:
    """All tokens at once: Jacobi iteration (section 3.1 of the paper)."""

    def stop(self, front: int, num_tokens: int) -> int:
        return num_tokens

    def check(self, num_tokens: int) -> None:
        pass


@dataclass(frozen=True)
class Segments:
    """`count` runs of equal length, solved one after the other: Gauss-Seidel-Jacobi (section 3.4 of the paper).

    Where `count` does not divide T, segment g ends at round-down((g + 1) T / count): lengths differ by at most one.
    """

    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"Segments(count={self.count!r}): give a positive whole number of segments")

    def stop(self, front: int, num_tokens: int) -> int:
        segment = ((front + 1) * self.count - 1) // num_tokens
        return (segment + 1) * num_tokens // self.count

    def check(self, num_tokens: int) -> None:
        if self.count > num_tokens:
            raise ValueError(
                f"Segments(count={self.count}): there are only {num_tokens} tokens; give at most {num_tokens} segments"
            )


@dataclass(frozen=True)
class Window:
    """The `size` tokens behind the front, which slides past the leading converged tokens after each sweep.

    Suits blocks in which convergence is a front that moves along the sequence. The window is shared by the batch.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Window(size={self.size!r}): give a positive whole number of tokens")

    def stop(self, front: int, num_tokens: int) -> int:
        return min(front + self.size, num_tokens)

    def check(self, num_tokens: int) -> None:
        pass
