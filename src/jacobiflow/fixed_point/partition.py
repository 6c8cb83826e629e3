"""Partitions: the runs of tokens that are swept together."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.registry import Piece, register_piece
from jacobiflow.utils.checks import check_count, check_fields

_MIN_WINDOW = 32
"""Tokens in the smallest window that `plan` tries."""


class Partition(Piece):
    """Chooses the run [front, stop) that is swept; the tokens before the front are final.

    Example:
        >>> class Halves(jf.Partition):
        ...     def stop(self, front, num_tokens):
        ...         return num_tokens // 2 if front < num_tokens // 2 else num_tokens
        >>> Halves().stop(0, 8), Halves().stop(5, 8)
        (4, 8)
    """

    @abstractmethod
    def stop(self, front: int, num_tokens: int) -> int:
        """Returns the end of the run that starts at `front`; front < stop <= num_tokens."""

    def check(self, num_tokens: int) -> None:
        """Raises ValueError if the partition does not fit a sequence of `num_tokens`."""

    def token_by_token(self, num_tokens: int) -> bool:
        """Tells if every run is one token, so that tokens are solved one after the other."""
        return all(self.stop(token, num_tokens) == token + 1 for token in range(num_tokens))

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[Partition, ...]:
        """Returns those that are tried on a sequence of `num_tokens`."""
        return ()


class SlidingRun(Partition):
    """A partition whose run has a size, wherever it starts, so that each sample can have a front of its own.

    Example:
        >>> class Half(jf.SlidingRun):
        ...     def run_size(self, num_tokens):
        ...         return max(num_tokens // 2, 1)
        >>> Half().stop(3, 8)
        7
    """

    @abstractmethod
    def run_size(self, num_tokens: int) -> int:
        """Returns the size of a run of a sequence of `num_tokens`, at least 1."""

    def stop(self, front: int, num_tokens: int) -> int:
        return min(front + self.run_size(num_tokens), num_tokens)


@register_piece("sequential")
@dataclass(frozen=True)
class Sequential(Partition):
    """One token at a time, exact: x_t = g(x)_t, by the block's `sequential_inverse` if it has one.

    Example:
        >>> jf.Sequential().stop(3, 8)
        4
    """

    def stop(self, front: int, num_tokens: int) -> int:
        return front + 1


@register_piece("whole")
@dataclass(frozen=True)
class Whole(SlidingRun):
    """All tokens at once: Jacobi iteration (section 3.1 of the paper).

    Example:
        >>> jf.Whole().stop(3, 8)
        8
    """

    def run_size(self, num_tokens: int) -> int:
        return num_tokens


@register_piece("segments")
@dataclass(frozen=True)
class Segments(Partition):
    """`count` runs, solved one after the other: Gauss-Seidel-Jacobi (section 3.4 of the paper).

    Segment g ends at round-down((g + 1) T / count): lengths differ by at most one.

    Example:
        >>> [jf.Segments(3).stop(front, 8) for front in (0, 2, 5)]
        [2, 5, 8]
    """

    count: int

    def __post_init__(self) -> None:
        check_count("Segments: count", self.count)
        check_fields(self)

    def stop(self, front: int, num_tokens: int) -> int:
        segment = ((front + 1) * self.count - 1) // num_tokens
        return (segment + 1) * num_tokens // self.count

    def check(self, num_tokens: int) -> None:
        if self.count > num_tokens:
            raise InputValueError(f"{self}: there are only {num_tokens} tokens; give at most {num_tokens} segments")


@register_piece("window")
@dataclass(frozen=True)
class Window(SlidingRun):
    """The `size` tokens from the front on, for blocks in which convergence moves along the sequence.

    Example:
        >>> jf.Window(4).stop(3, 8)
        7
    """

    size: int

    def __post_init__(self) -> None:
        check_count("Window: size", self.size)
        check_fields(self)

    def run_size(self, num_tokens: int) -> int:
        return self.size

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[Partition, ...]:
        """Returns windows of 32, 64, 128 .. tokens, up to half of the sequence."""
        sizes = (_MIN_WINDOW << doublings for doublings in range(num_tokens.bit_length()))
        return tuple(cls(size) for size in sizes if size <= num_tokens / 2)
