"""Which tokens are swept together, and when a solver moves on.

A solver keeps a front: the tokens before it are final. A partition says where the run of swept tokens that starts at
the front ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jacobiflow.checks import check_count, convert_numbers
from jacobiflow.codec import family, register
from jacobiflow.errors import InputValueError

_SMALLEST = 32  # tokens in a window that is tried: hardly a plan had fewer, see benchmarks/tuning_grid.py


@family
class Partition(ABC):
    """Chooses the swept run [front, stop)."""

    @abstractmethod
    def stop(self, front: int, num_tokens: int) -> int:
        """End of the run that starts at `front`; front < stop <= num_tokens."""

    def check(self, num_tokens: int) -> None:  # noqa: B027  most fit any sequence
        """**Raises** `ValueError` where the partition does not fit a sequence of `num_tokens`."""

    def token_by_token(self, num_tokens: int) -> bool:
        """Whether every run is one token, so that a solve is the exact recurrence."""
        return False

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[Partition, ...]:
        """Those that `jacobiflow.tune` tries on a sequence of `num_tokens`, for `jacobiflow.plan` to choose from."""
        return ()


class SlidingRun(Partition):
    """A partition whose run slides with the front: it has a size, wherever it starts.

    Each sample of a batch can then have a front of its own, where the block allows it; see `jacobiflow.solve`.
    """

    @abstractmethod
    def run_size(self, num_tokens: int) -> int:
        """The size of a run of a sequence of `num_tokens`, at least 1."""

    def stop(self, front: int, num_tokens: int) -> int:
        return min(front + self.run_size(num_tokens), num_tokens)


@register("sequential")
@dataclass(frozen=True)
class Sequential(Partition):
    """One token at a time, exact: the recurrence x_t = g(x)_t.

    T network calls on one token each, which a block with an `ExactInverse` makes in one piece.
    """

    def stop(self, front: int, num_tokens: int) -> int:
        return front + 1

    def token_by_token(self, num_tokens: int) -> bool:
        return True


@register("whole")
@dataclass(frozen=True)
class Whole(SlidingRun):
    """All tokens at once: Jacobi iteration (section 3.1 of the paper)."""

    def run_size(self, num_tokens: int) -> int:
        return num_tokens


@register("segments")
@dataclass(frozen=True)
class Segments(Partition):
    """`count` runs of equal length, solved one after the other: Gauss-Seidel-Jacobi (section 3.4 of the paper).

    Where `count` does not divide T, segment g ends at round-down((g + 1) T / count): lengths differ by at most one.
    """

    count: int

    def __post_init__(self) -> None:
        convert_numbers(self)
        check_count("Segments: count", self.count)

    def stop(self, front: int, num_tokens: int) -> int:
        segment = ((front + 1) * self.count - 1) // num_tokens
        return (segment + 1) * num_tokens // self.count

    def token_by_token(self, num_tokens: int) -> bool:
        return self.count == num_tokens

    def check(self, num_tokens: int) -> None:
        if self.count > num_tokens:
            raise InputValueError(
                f"Segments(count={self.count}): there are only {num_tokens} tokens; give at most {num_tokens} segments"
            )


@register("window")
@dataclass(frozen=True)
class Window(SlidingRun):
    """The `size` tokens behind the front, which slides past the leading converged tokens after each sweep.

    Suits blocks in which convergence is a front that moves along the sequence.
    """

    size: int

    def __post_init__(self) -> None:
        convert_numbers(self)
        check_count("Window: size", self.size)

    def run_size(self, num_tokens: int) -> int:
        return min(self.size, num_tokens)

    def token_by_token(self, num_tokens: int) -> bool:
        return self.size == 1

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[Partition, ...]:
        """Windows of 32, 64, 128 .. tokens, up to half of them, and of all."""
        sizes: list[int] = []
        while _SMALLEST << len(sizes) <= num_tokens / 2:
            sizes.append(_SMALLEST << len(sizes))
        return tuple(cls(size) for size in (*sizes, num_tokens))
