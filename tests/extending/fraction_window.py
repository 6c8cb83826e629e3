"""A partition from outside the package: a window over a fraction of the sequence, whatever its length."""

from __future__ import annotations

from dataclasses import dataclass

import jacobiflow as jf


@jf.register("fraction")
@dataclass(frozen=True)
class FractionWindow(jf.SlidingRun):
    """A window over one of `parts` equal parts of the sequence, but over `least` tokens if that is more."""

    parts: int
    least: int

    def __post_init__(self) -> None:
        if self.parts < 1 or self.least < 1:
            raise jf.InputError(f"FractionWindow({self.parts}, {self.least}): give numbers of at least 1")

    def run_size(self, num_tokens: int) -> int:
        return min(max(num_tokens // self.parts, self.least), num_tokens)

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[jf.Partition, ...]:
        return (cls(6, 4),)
