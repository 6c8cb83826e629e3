"""Signals that end a training run after its step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_SAME_SIGNAL_SECONDS = 1.0  # Signals within this time are one: a terminal and torchrun both send Ctrl-C.


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that SIGINT, SIGTERM and SIGUSR1 set until the block ends, if this is the main thread.

    Another signal then raises KeyboardInterrupt.
    """
    stop, first_time = threading.Event(), 0.0

    def receive(number: int, frame: object) -> None:
        nonlocal first_time
        if not stop.is_set():
            first_time = time.monotonic()
            stop.set()
        elif time.monotonic() - first_time > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    earlier = {number: signal.signal(number, receive) for number in _SIGNALS if is_main}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_stop_signals(worker: int) -> None:
    """Lets a worker process of a data loader go on, since the training process needs it until the end of the step."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
