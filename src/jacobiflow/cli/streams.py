"""Standard streams that no character and no lost reader turns into a failure of the work."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import IO, Any


class _Lenient:
    """A text stream that goes silent where it cannot be written to."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, if that is possible."""
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, if that is possible."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Characters that a stream has not become "?", and stderr, where only messages go, may be closed or full."""
    before = {stream: stream.errors for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)}
    for stream in before:
        stream.reconfigure(errors="replace")
    try:
        with redirect_stderr(_Lenient(sys.stderr)):
            yield
    finally:
        for stream, errors in before.items():
            with suppress(OSError):
                stream.reconfigure(errors=errors)


def silence(stream: IO[str]) -> None:
    """Let what was or will be written to `stream` go nowhere: Python writes the rest at its end, and must not fail."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
