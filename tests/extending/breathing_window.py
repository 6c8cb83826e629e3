"""A partition from outside the package: a window that grows while its tokens converge together, and else shrinks."""

from __future__ import annotations

from dataclasses import dataclass

import jacobiflow as jf


@jf.register("breathing")
@dataclass(frozen=True)
class BreathingWindow(jf.SlidingRun):
    """A window of `least` to `most` tokens, each sample's behind a front of its own.

    It doubles after a sweep that passed more than half of it, and halves after one that passed less than an eighth.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"BreathingWindow({self.least}, {self.most}): give 1 <= least <= most")

    def run_size(self, num_tokens: int, last: jf.Sweep | None) -> int:
        if last is None:
            size = self.least
        elif 2 * last.passed > last.size:
            size = 2 * last.size
        else:
            size = last.size // 2 if 8 * last.passed < last.size else last.size
        return min(max(size, self.least), self.most, num_tokens)

    @classmethod
    def candidates(cls, num_tokens: int) -> tuple[jf.Partition, ...]:
        return (cls(min(16, num_tokens), num_tokens),)
