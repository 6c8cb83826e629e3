"""Protocol of progress callbacks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callable that long functions call after each step.

    Functions take `progress: Progress | None = None`; `None` reports nothing.
    """

    def __call__(self, done: int, total: int, what: str) -> None:
        """Reports that `done` of `total` steps of `what`, such as "sampling", are finished."""
        ...
