"""One protocol for progress: what a function calls while it works, and what a bar implements."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callable that long functions call after each step.

    Functions take `progress: Progress | None = None`; `None` is silence.
    """

    def __call__(self, done: int, total: int, what: str) -> None:
        """Notes that `done` of `total` steps of `what`, a word or two such as "sampling", are finished."""
        ...
