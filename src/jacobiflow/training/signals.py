"""Signals that end a training run after its step."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME = 1.0  # Signals within so many seconds are one: a terminal and torchrun both send Ctrl-C.


class StopSignals:
    """Receives SIGINT, SIGTERM and SIGUSR1 while its block runs, in the main thread.

    Attributes:
        received: Whether a signal has come. A second one raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received = False
        self._time = 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received and now - self._time > _SAME:
            raise KeyboardInterrupt
        self.received, self._time = True, now
