"""A partition of your own: a window over a fraction of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import jacobiflow as jf


@jf.register_piece("fraction")
@dataclass(frozen=True)
class FractionWindow(jf.SlidingRun):
    """A window over a part of the sequence, 1 of `parts`, or over `least` tokens."""

    parts: int
    least: int

    def __post_init__(self) -> None:
        if self.parts < 1 or self.least < 1:
            raise jf.InputError(f"{self}: give numbers of at least 1")

    def run_size(self, num_tokens: int) -> int:
        return min(max(num_tokens // self.parts, self.least), num_tokens)

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[jf.Partition, ...]:
        return (cls(6, 4),)
